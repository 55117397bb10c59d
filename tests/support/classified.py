"""The digits with their classifier, trained once (for 300 steps) for all who ask for it."""

import shutil
from unittest import mock

from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.quality import classifier


def classified_digits(run_data, once):
    """A data_dir; its classifier is read, not trained. For those who only read: it is shared."""

    def make(folder):
        shutil.copytree(run_data, folder, dirs_exist_ok=True)
        with mock.patch.object(classifier, "_STEPS", 300):
            classifier.load_classifier(DataConfig(dir=str(folder)), log=lambda line: None)

    return once("classified_digits", make)

"""CIFAR-10, 32x32 colour: the setting of the paper's main experiment.

Reproduces:  "Adaptive Non-Uniform Timestep Sampling for Accelerating Diffusion Model Training",
             CVPR 2025, arXiv 2411.09998: CIFAR-10 with the quad schedule. Hyperparameters are
             those of the official code; where code and paper differ, the sampler has this
             library's defaults (see the options of `adaptive`).
Rows:        cifar10        the adaptive sampler, by the paper's hyperparameters
             cifar10_LABEL  the paper's comparison and the newer methods, the labels of
                            configs/digits.py, everything else the same
Command:     adaptive-ts train cifar10
             adaptive-ts tables cifar10 --schedules quad linear cosine
             --generate.num_images 50000 --image_evaluations 5 --inception_weights PATH --dry_run
Hardware:    not yet run
Hours:       not yet known
Expected:    FID on 50,000 images of 1,000 ancestral steps, at 160k, 320k, 480k, 640k, 800k steps
Measured:    not yet
"""

import dataclasses

from adaptive_ts.experiment import config as c
from adaptive_ts.experiment.config.rows import comparison

_ADAPTIVE = c.Config(
    data=c.DataConfig(name="cifar10", flip=True),
    model=c.ModelConfig(
        channels=128,
        multipliers=(1, 2, 2, 2),
        res_blocks=2,
        attention=(False, True, False, False),  # at 16x16
        dropout=0.1,
        prediction="eps",
        variance="fixed_large",
    ),
    schedule=c.ScheduleConfig(name="quad", num_timesteps=1000),
    sampler=c.SamplerConfig(name="adaptive", learning_rate=1e-2, num_selected=3),
    optimizer=c.OptimizerConfig(
        learning_rate=2e-4, b1=0.9, b2=0.999, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999
    ),
    train=c.TrainConfig(steps=795_600, batch_size=128, log_every=100, save_every=10_000),
    generate=c.GenerateConfig(num_images=64, solver="ddpm", steps=1000),
)

_UNIFORM = dataclasses.replace(_ADAPTIVE, sampler=c.SamplerConfig(name="uniform"))

ROWS = {
    "cifar10": _ADAPTIVE,
    **comparison("cifar10", _UNIFORM, {"sampler.learning_rate": 1e-2}),
}

"""CelebA-HQ, 256x256 colour, in pixels: 30,000 faces.

Reproduces:  DDPM's CelebA-HQ model, "Denoising Diffusion Probabilistic Models", Ho et al. 2020,
             arXiv 2006.11239, with the adaptive sampler of CVPR 2025 (arXiv 2411.09998) in place
             of uniform timesteps. The network (113,673,219 parameters), schedule, variance,
             optimizer, batch and flips are those of DDPM's run_celebahq.py, the 0.5 million steps
             those of its appendix B. From CVPR 2025's code: the average of the weights warms up.
             Ours: the sampler's options, which are those of configs/cifar10.py; and every 50th
             image is held out, since tensorflow-datasets sets none apart.
Rows:        celebahq256        the adaptive sampler
             celebahq256_LABEL  the paper's comparison and the newer methods, the labels of
                                configs/digits.py, everything else the same
Command:     adaptive-ts train celebahq256
             With TensorFlow and data256x256.tar in DATA_DIR/downloads/manual, tensorflow-datasets
             prepares the set; without, from a folder of images:
             adaptive-ts train celebahq256 --data.name folder/celebahq --data.image_size 256
             --data.source_dir DIR
             adaptive-ts tables celebahq256 --dry_run
Hardware:    not yet run
Hours:       not yet known
Expected:
Measured:    not yet
"""

import dataclasses

from adaptive_ts.experiment import config as c
from adaptive_ts.experiment.config.rows import comparison

_ADAPTIVE = c.Config(
    data=c.DataConfig(name="celeb_a_hq/256", flip=True),
    model=c.ModelConfig(
        channels=128,
        multipliers=(1, 1, 2, 2, 4, 4),
        res_blocks=2,
        attention=(False, False, False, False, True, False),  # at 16x16
        dropout=0.0,
        prediction="eps",
        variance="fixed_small",
    ),
    schedule=c.ScheduleConfig(name="linear", num_timesteps=1000),
    sampler=c.SamplerConfig(name="adaptive", learning_rate=1e-2),
    optimizer=c.OptimizerConfig(
        learning_rate=2e-5, b1=0.9, b2=0.999, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999
    ),
    train=c.TrainConfig(steps=500_000, batch_size=64, log_every=100, save_every=10_000),
    generate=c.GenerateConfig(num_images=16, solver="ddpm", steps=1000),
)

_UNIFORM = dataclasses.replace(_ADAPTIVE, sampler=c.SamplerConfig(name="uniform"))

ROWS = {
    "celebahq256": _ADAPTIVE,
    **comparison("celebahq256", _UNIFORM, {"sampler.learning_rate": 1e-2}),
}

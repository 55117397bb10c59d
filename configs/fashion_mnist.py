"""Fashion-MNIST, 28x28 grey padded to 32x32: a set of 60,000 images for a small machine.

Reproduces:  nothing published; between the digits and CIFAR-10
Rows:        fashion_mnist          the adaptive sampler (CVPR 2025)
             fashion_mnist_uniform  uniform sampling, everything else the same
Command:     train.py fashion_mnist
Hardware:    not yet run; meant for one GPU
Hours:       not yet known
Expected:    no published number
Measured:    not yet
"""

import dataclasses

from adaptive_ts.experiment import config as c

_ADAPTIVE = c.Config(
    data=c.DataConfig(name="fashion_mnist", image_size=32),
    model=c.ModelConfig(
        channels=64, multipliers=(1, 2, 2), res_blocks=1, attention=(False, True, False)
    ),
    schedule=c.ScheduleConfig(name="linear"),
    sampler=c.SamplerConfig(name="adaptive"),
    optimizer=c.OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, ema_decay=0.999),
    train=c.TrainConfig(steps=30_000, batch_size=128, log_every=50, save_every=2000),
)

ROWS = {
    "fashion_mnist": _ADAPTIVE,
    "fashion_mnist_uniform": dataclasses.replace(
        _ADAPTIVE, sampler=c.SamplerConfig(name="uniform")
    ),
}

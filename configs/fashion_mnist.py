"""Fashion-MNIST, 28x28 grey padded to 32x32: a set of 60,000 images for a small machine.

Reproduces:  nothing published; between the digits and CIFAR-10
Rows:        fashion_mnist        the adaptive sampler, at a size for one GPU
             fashion_mnist_LABEL  the paper's comparison and the newer methods, the labels of
                                  configs/digits.py, at a size for two CPU cores
Command:     adaptive-ts train fashion_mnist
             adaptive-ts tables fashion_mnist --jobs 2
Hardware:    2 CPU cores, but for the row fashion_mnist: one GPU, not yet run
Hours:       0.07 to 0.1 per run of the table on one core; 6,000 steps on both: 0.3
Expected:    no published number
Measured:    the table: docs/tables/fashion_mnist-linear-4a83ecac6892.md, 3 seeds of six rows
"""

from adaptive_ts.experiment import config as c
from adaptive_ts.experiment.config.rows import comparison

_DATA = c.DataConfig(name="fashion_mnist", image_size=32)

_BASE = c.Config(
    data=_DATA,
    model=c.ModelConfig(
        channels=16, multipliers=(1, 2, 2), attention=(False, False, True), groups=4
    ),
    sampler=c.SamplerConfig(name="uniform"),
    optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=100, ema_decay=0.995),
    train=c.TrainConfig(steps=1200, batch_size=32, log_every=20, save_every=400),
    generate=c.GenerateConfig(num_images=1000, steps=25),
)

ROWS = {
    "fashion_mnist": c.Config(
        data=_DATA,
        model=c.ModelConfig(channels=64, multipliers=(1, 2, 2), attention=(False, True, False)),
        sampler=c.SamplerConfig(name="adaptive"),
        optimizer=c.OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, ema_decay=0.999),
        train=c.TrainConfig(steps=30_000, batch_size=128, log_every=50, save_every=2000),
    ),
    **comparison("fashion_mnist", _BASE, {"sampler.entropy_coef": 0.1}),
}

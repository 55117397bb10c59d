"""Handwritten digits, 8x8 grey, 1,797 images that come with scikit-learn: no download.

Reproduces:  nothing published; the newcomer's row, to see the sampler work in minutes
Rows:        digits          the adaptive sampler (CVPR 2025)
             digits_uniform  uniform sampling, everything else the same
Command:     train.py digits
Hardware:    2 CPU cores
Time:        1:43 with everything installed, 65 s of it training (JAX 0.10.2, CPU)
Expected:    samples that a person recognises as digits
Measured:    VLB 4.67 bits/dim (seed 0, the seed that the row was tuned on)
"""

import dataclasses

from adaptive_ts.experiment import config as c

_ADAPTIVE = c.Config(
    data=c.DataConfig(name="digits"),
    model=c.ModelConfig(channels=16, multipliers=(1, 2), attention=(False, True), groups=4),
    schedule=c.ScheduleConfig(name="linear"),
    # 25 probes in all: the policy is kept on a shorter leash than in a long run.
    sampler=c.SamplerConfig(name="adaptive", learning_rate=1e-3, entropy_coef=0.1),
    optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=200, ema_decay=0.995),
    train=c.TrainConfig(steps=1000, batch_size=64, log_every=20, save_every=500),
)

ROWS = {
    "digits": _ADAPTIVE,
    "digits_uniform": dataclasses.replace(_ADAPTIVE, sampler=c.SamplerConfig(name="uniform")),
}

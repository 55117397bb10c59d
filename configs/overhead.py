"""What the adaptive sampler costs per step, with a model that dwarfs its bookkeeping.

Reproduces:  nothing published; the arithmetic says 1.063 (24.2 extra forwards per step of 128
             images, a forward counted as a third of a step)
Rows:        overhead  digits, batch 128, f_S=40, 100 buckets, |S|=3, as in the paper
Command:     adaptive-ts overhead
             adaptive-ts throughput --torch, images per second
Hardware:    any; 2 CPU cores take four minutes
Expected:    at most 1.10
Measured:    1.085 (1.042 to 1.155 over 5 cycles) of wall-clock, 1.075 of FLOPs, 2 CPU cores
"""

from adaptive_ts.experiment import config as c

ROWS = {
    "overhead": c.Config(
        data=c.DataConfig(name="digits"),
        model=c.ModelConfig(channels=32, multipliers=(1, 2), attention=(False, True)),
        optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        train=c.TrainConfig(steps=40, batch_size=128),
    ),
}

"""What the adaptive sampler costs per step, with a model that dwarfs its bookkeeping.

Reproduces:  nothing published; the arithmetic says 1.037 (14.1 extra forwards per step of 128
             images, a forward counted as a third of a step)
Rows:        overhead  digits, batch 128, f_S=40, 25 buckets, |S|=2
Command:     adaptive-ts overhead
             adaptive-ts throughput --torch, images per second
Hardware:    any; 2 CPU cores take four minutes
Expected:    at most 1.10
Measured:    1.029 (0.880 to 1.075 over 5 cycles) of wall-clock, 1.054 of FLOPs, 2 CPU cores,
             jaxlib 0.10.2; 1.032 (0.946 to 1.109) with 0.12.0.1
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

"""ImageNet, 256x256 colour, 1,000 classes, as latents 32x32x4 of Stable Diffusion's autoencoder.

Reproduces:  DiT-XL/2 at 400,000 steps, "Scalable Diffusion Models with Transformers", Peebles & Xie
             2023, arXiv 2212.09748, with the adaptive sampler of CVPR 2025 (arXiv 2411.09998) in
             place of uniform timesteps. DiT's: the network, Adam at a constant 1e-4, batch 256,
             the average of the weights, the linear schedule, classes dropped in 10% of the
             examples, 250 ancestral steps. Ours: the variance of the reverse step is fixed, not
             learned (so the network has 4 output channels, not 8); a latent is drawn from its
             posterior once, not in each epoch; the network computes in bfloat16; the gradient's
             norm is clipped at 1; the average warms up; the sampler's options are those of
             configs/cifar10.py.
Rows:        imagenet256        the adaptive sampler
             imagenet256_LABEL  the paper's comparison and the newer methods, the labels of
                                configs/digits.py, everything else the same
Command:     adaptive-ts encode IMAGENET DATA_DIR --flip
             --name imagenet256_latents
             where IMAGENET holds train/ and val/, with a subfolder for each class; then
             adaptive-ts train imagenet256 --data.dir DATA_DIR
             adaptive-ts tables imagenet256 --dry_run
Hardware:    not yet run
Hours:       not yet known
Expected:
Measured:    not yet
"""

import dataclasses

from adaptive_ts.experiment import config as c
from adaptive_ts.experiment.config.rows import comparison

_ADAPTIVE = c.Config(
    data=c.DataConfig(name="imagenet256_latents"),
    model=c.ModelConfig(
        name="dit",
        transformer=c.TransformerConfig(
            patch_size=2,
            hidden_size=1152,
            depth=28,
            num_heads=16,
            num_classes=1000,
            class_dropout=0.1,
        ),
        dtype="bfloat16",
        prediction="eps",
        variance="fixed_large",
    ),
    schedule=c.ScheduleConfig(name="linear", num_timesteps=1000),
    sampler=c.SamplerConfig(name="adaptive", learning_rate=1e-2),
    optimizer=c.OptimizerConfig(
        learning_rate=1e-4, b1=0.9, b2=0.999, warmup_steps=0, clip_norm=1.0, ema_decay=0.9999
    ),
    train=c.TrainConfig(steps=400_000, batch_size=256, log_every=100, save_every=10_000),
    generate=c.GenerateConfig(num_images=16, solver="ddpm", steps=250),
)

_UNIFORM = dataclasses.replace(_ADAPTIVE, sampler=c.SamplerConfig(name="uniform"))

ROWS = {
    "imagenet256": _ADAPTIVE,
    **comparison("imagenet256", _UNIFORM, {"sampler.learning_rate": 1e-2}),
}

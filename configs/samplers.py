"""The comparison of samplers and weightings on small images: one row per method.

Reproduces:  nothing published; equal steps, several seeds, one setting for all sets and schedules
Rows:        bench_uniform               what every other row is compared with, seed by seed
             bench_stratified            uniform, one draw per stratum of the batch
             bench_beta_1_2              a static tilt to low noise
             bench_logit_normal          Stable Diffusion 3's law
             bench_speed                 SpeeD, as its paper intends, with its weighting
             bench_min_snr               uniform, Min-SNR-5 weighting
             bench_loss_second_moment    improved DDPM's resampler
             bench_entropy_rate          InfoNoise
             bench_loss_proportional     p ~ L, weights 1
             bench_adaptive_as_published CVPR 2025, as the released code has it
             bench_adaptive              the same with our defaults, but for entropy_coef 0.1
             bench_impact                forward-mode impact
Command:     python -m adaptive_ts.experiment.bench --seeds 10 11 12 13 14 --jobs 2
Hardware:    2 CPU cores, a run on each
Time:        about a minute per run
Expected:    a better bound than uniform's at equal steps, images no worse
Measured:    the README's table; the runs are in docs/bench
"""

from adaptive_ts.experiment import config as c

_BASE = c.Config(
    data=c.DataConfig(name="digits"),
    model=c.ModelConfig(channels=16, multipliers=(1, 2), attention=(False, True), groups=4),
    sampler=c.SamplerConfig(name="uniform"),
    optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=200, ema_decay=0.995),
    train=c.TrainConfig(steps=960, batch_size=64),
    generate=c.GenerateConfig(num_images=1000, steps=25),
)

_AS_PUBLISHED = {
    "sampler.name": "adaptive",
    "sampler.learning_rate": 1e-2,
    "sampler.common_noise": False,
    "sampler.entropy": "in_reward",
    "sampler.reduce": "sum",
    "sampler.normalize_reward": False,
    "sampler.lagged_selection": True,
    "sampler.num_buckets": 1000,
    "sampler.rounding": "nearest",
}

ROWS = {
    "bench_uniform": _BASE,
    "bench_stratified": c.replace(_BASE, {"sampler.stratified": True}),
    "bench_beta_1_2": c.replace(
        _BASE, {"sampler.name": "beta", "sampler.beta.a": 1.0, "sampler.beta.b": 2.0}
    ),
    "bench_logit_normal": c.replace(_BASE, {"sampler.name": "logit_normal"}),
    "bench_speed": c.replace(_BASE, {"sampler.name": "speed", "weighting.name": "change_aware"}),
    "bench_min_snr": c.replace(_BASE, {"weighting.name": "min_snr"}),
    "bench_loss_second_moment": c.replace(_BASE, {"sampler.name": "loss_second_moment"}),
    "bench_entropy_rate": c.replace(_BASE, {"sampler.name": "entropy_rate"}),
    "bench_loss_proportional": c.replace(
        _BASE,
        {
            "sampler.name": "loss_proportional",
            "sampler.proportional.importance_weighted": False,
        },
    ),
    "bench_adaptive_as_published": c.replace(_BASE, _AS_PUBLISHED),
    "bench_adaptive": c.replace(_BASE, {"sampler.name": "adaptive", "sampler.entropy_coef": 0.1}),
    "bench_impact": c.replace(_BASE, {"sampler.name": "impact"}),
}

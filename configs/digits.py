"""Handwritten digits, 8x8 grey, 1,797 images that come with scikit-learn: no download.

Reproduces:  nothing published; the newcomer's row, to see the sampler work in minutes, and the
             paper's kind of table on a laptop
Rows:        digits                       the adaptive sampler (CVPR 2025); what train.py runs
             digits_uniform               what every other row is compared with, seed by seed
             digits_p2                    uniform, P2 weighting
             digits_min_snr               uniform, Min-SNR-5 weighting
             digits_log_normal            EDM's law of sigma
             digits_clts                  curriculum: from uniform to a Gaussian
             digits_speed                 SpeeD, as its paper intends, with its weighting
             digits_adaptive              CVPR 2025, with our defaults but for entropy_coef 0.1
             digits_adaptive_p2           the same on top of P2
             digits_adaptive_min_snr      on top of Min-SNR
             digits_adaptive_log_normal   on top of EDM's law, as a loss weighting
             digits_adaptive_clts         on top of the curriculum, as a loss weighting
             digits_adaptive_speed        on top of SpeeD, both of its parts as loss weightings
             digits_adaptive_as_published as the released code has it
             digits_stratified            uniform, one draw per stratum of the batch
             digits_beta_1_2              a static tilt to low noise
             digits_logit_normal          Stable Diffusion 3's law
             digits_loss_second_moment    improved DDPM's resampler
             digits_entropy_rate          InfoNoise
             digits_loss_proportional     p ~ L, weights 1
             digits_impact                forward-mode impact
Command:     adaptive-ts train digits
             adaptive-ts tables digits --schedules linear cosine quad
Hardware:    2 CPU cores
Time:        train.py: 1:03 with everything installed (jaxlib 0.10.2), 0:56 (0.12.0.1);
             tables: about a minute per run, two at a time
Expected:    samples that a person recognises as digits; a better bound than uniform's
Measured:    train.py: VLB 4.47 bits/dim (seed 0, the seed that the row was tuned on);
             tables: docs/results.md; the runs are in docs/tables
"""

from adaptive_ts.experiment import config as c
from adaptive_ts.experiment.config.rows import comparison

_MODEL = c.ModelConfig(channels=16, multipliers=(1, 2), attention=(False, True), groups=4)
_OPTIMIZER = c.OptimizerConfig(learning_rate=1e-3, warmup_steps=200, ema_decay=0.995)

_BASE = c.Config(
    data=c.DataConfig(name="digits"),
    model=_MODEL,
    sampler=c.SamplerConfig(name="uniform"),
    optimizer=_OPTIMIZER,
    train=c.TrainConfig(steps=960, batch_size=64, log_every=20, save_every=480),
    generate=c.GenerateConfig(num_images=1000, steps=25),
)

ROWS = {
    "digits": c.Config(
        data=c.DataConfig(name="digits"),
        model=_MODEL,
        schedule=c.ScheduleConfig(name="linear"),
        # 25 probes in all: the policy is kept on a shorter leash than in a long run.
        sampler=c.SamplerConfig(name="adaptive", learning_rate=1e-3, entropy_coef=0.1),
        optimizer=_OPTIMIZER,
        train=c.TrainConfig(steps=1000, batch_size=64, log_every=20, save_every=500),
    ),
    **comparison("digits", _BASE, {"sampler.entropy_coef": 0.1}),
}

"""The public names: what resolves lazily at run time, as type checkers see it."""

from . import diffusion as diffusion
from . import learning as learning
from . import samplers as samplers
from . import schedules as schedules
from . import timesteps as timesteps
from . import weightings as weightings
from .density import effective_density as effective_density
from .diffusion import ExampleLoss as ExampleLoss
from .diffusion import corrupt as corrupt
from .diffusion import denoising_loss as denoising_loss
from .diffusion import vlb_loss as vlb_loss
from .samplers import adaptive as adaptive
from .samplers import beta as beta
from .samplers import cosmap as cosmap
from .samplers import curriculum as curriculum
from .samplers import entropy_rate as entropy_rate
from .samplers import from_probabilities as from_probabilities
from .samplers import impact as impact
from .samplers import importance_weighted as importance_weighted
from .samplers import log_normal_sigma as log_normal_sigma
from .samplers import log_snr_cauchy as log_snr_cauchy
from .samplers import log_snr_cosine as log_snr_cosine
from .samplers import log_snr_laplace as log_snr_laplace
from .samplers import logit_normal as logit_normal
from .samplers import lognorm_timestep as lognorm_timestep
from .samplers import loss_proportional as loss_proportional
from .samplers import loss_second_moment as loss_second_moment
from .samplers import mixed_with_uniform as mixed_with_uniform
from .samplers import mode as mode
from .samplers import speed as speed
from .samplers import uniform as uniform
from .samplers import with_density_of as with_density_of
from .samplers import with_weighting as with_weighting
from .schedules import NoiseSchedule as NoiseSchedule
from .testing import check_sampler as check_sampler
from .timesteps import GridSample as GridSample
from .timesteps import TimeGrid as TimeGrid
from .timesteps import continuous as continuous
from .timesteps import discrete as discrete
from .types import IndexedLossFn as IndexedLossFn
from .types import LossFn as LossFn
from .types import TimestepSample as TimestepSample
from .types import TimestepSampler as TimestepSampler
from .types import Weighting as Weighting

__all__ = [
    "ExampleLoss",
    "GridSample",
    "IndexedLossFn",
    "LossFn",
    "NoiseSchedule",
    "TimeGrid",
    "TimestepSample",
    "TimestepSampler",
    "Weighting",
    "adaptive",
    "beta",
    "check_sampler",
    "continuous",
    "corrupt",
    "cosmap",
    "curriculum",
    "denoising_loss",
    "diffusion",
    "discrete",
    "effective_density",
    "entropy_rate",
    "from_probabilities",
    "impact",
    "importance_weighted",
    "learning",
    "log_normal_sigma",
    "log_snr_cauchy",
    "log_snr_cosine",
    "log_snr_laplace",
    "logit_normal",
    "lognorm_timestep",
    "loss_proportional",
    "loss_second_moment",
    "mixed_with_uniform",
    "mode",
    "samplers",
    "schedules",
    "speed",
    "timesteps",
    "uniform",
    "vlb_loss",
    "weightings",
    "with_density_of",
    "with_weighting",
]
__version__: str

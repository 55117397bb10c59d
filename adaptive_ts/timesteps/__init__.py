"""Draws on (0, 1), timesteps t and buckets: grids, couplings and fixed laws."""

from adaptive_ts.timesteps.draws import Coupling, unit_draws
from adaptive_ts.timesteps.grid import GridSample, TimeGrid, continuous, discrete, strata

__all__ = ["Coupling", "GridSample", "TimeGrid", "continuous", "discrete", "strata", "unit_draws"]

"""The former name of :mod:`fxprune.measure`."""

raise ImportError("fxprune.cost is called fxprune.measure now; count and measure_latency are there.")

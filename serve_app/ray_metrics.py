"""Measurements to Ray's agent, whose port of each node shows those of all replicas there.

A route cannot: behind Serve's proxy each scrape would reach another replica.
"""

from ray.util import metrics as ray_metrics

from serve_app.metrics import INSTRUMENTS, PREFIX, Instrument


class RaySink:
    """The same instruments as Ray's own; Ray puts `ray_` before their names."""

    def __init__(self, replica: str) -> None:
        """`replica` tells this replica's numbers from others'."""
        self._metrics: dict[str, ray_metrics.Metric] = {}
        for item in INSTRUMENTS:
            self._metrics[item.name] = _made(item)
            self._metrics[item.name].set_default_tags({"replica": replica})

    def record(self, instrument: Instrument, value: float, labels: dict[str, str]) -> None:
        """See `Sink.record`."""
        match self._metrics[instrument.name]:
            case ray_metrics.Counter() as counter:
                if value:  # Ray refuses to add nothing
                    counter.inc(value, labels)
            case ray_metrics.Gauge() as gauge:
                gauge.set(value, labels)
            case ray_metrics.Histogram() as histogram:
                histogram.observe(value, labels)


def _made(item: Instrument) -> ray_metrics.Metric:
    name, keys = PREFIX + item.name, (*item.labels, "replica")
    match item.kind:
        case "counter":
            return ray_metrics.Counter(name, item.text, keys)
        case "gauge":
            return ray_metrics.Gauge(name, item.text, keys)
        case "histogram":
            return ray_metrics.Histogram(name, item.text, list(item.buckets), keys)

"""Counts and times of requests for /metrics, in vLLM's units and much of its names. A sink of `Watch`."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.api.watch.record import RequestRecord

# Agents and keys with a line of their own; more of them are counted together, as "other".
MAX_LABELS = 100
OTHER = "other"
WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
GAP_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)


class RequestMetrics:
    """Owns the counters of one app; called in the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"glmserve_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = WAIT_BUCKETS) -> Histogram:
            return Histogram(f"glmserve_{name}_seconds", text, registry=registry, buckets=buckets)

        self._requests = counter("requests", "requests that are over", "route", "status")
        self._refusals = counter("refusals", "requests that were not answered, by the reason", "reason")
        self._prompt = counter("prompt_tokens", "tokens of prompts")
        self._cached = counter("cached_tokens", "those of them that were not computed")
        self._generated = counter("generation_tokens", "tokens written")
        self._by_key = counter("key_tokens", "tokens of prompts and answers by the name of the key", "key")
        self._requests_by_key = counter(
            "key_requests", "requests that are over by the name of the key", "key"
        )
        self._by_agent = counter("agent_tokens", "tokens by session, user or title", "agent")
        self._queue = histogram("request_queue_time", "from arrival until the engine takes a request")
        self._first = histogram("time_to_first_token", "from arrival to the first token")
        self._gaps = histogram("inter_token_latency", "between two tokens of an answer", GAP_BUCKETS)
        self._whole = histogram("e2e_request_latency", "from arrival to the end of an answer")
        self._names: dict[Counter, set[str]] = {self._by_key: set(), self._by_agent: set()}

    def __call__(self, record: RequestRecord) -> None:
        """Counts a request that is over."""
        self._requests.labels(f"{record.route}", str(record.status)).inc()
        self._requests_by_key.labels(self._bounded(self._by_key, record.key_name)).inc()
        if record.reason:
            self._refusals.labels(record.reason).inc()
        if not record.is_generation:
            return
        used = record.tokens
        self._prompt.inc(used.num_prompt_tokens)
        self._cached.inc(used.num_cached_tokens)
        self._generated.inc(used.num_completion_tokens)
        num_tokens = used.num_prompt_tokens + used.num_completion_tokens
        self._by_key.labels(self._bounded(self._by_key, record.key_name)).inc(num_tokens)
        self._by_agent.labels(self._bounded(self._by_agent, record.title or "unnamed")).inc(num_tokens)
        self._note_times(record)

    def _note_times(self, record: RequestRecord) -> None:
        if record.queue_s is not None:
            self._queue.observe(record.queue_s)
        if record.first_s is not None:
            self._first.observe(record.first_s)
        for answer in record.answers:
            for gap in answer.token_gaps:
                self._gaps.observe(gap)
        self._whole.observe(record.total_s)

    def _bounded(self, counter: Counter, name: str) -> str:
        names = self._names[counter]
        if name not in names and len(names) >= MAX_LABELS:
            return OTHER
        names.add(name)
        return name[:100]

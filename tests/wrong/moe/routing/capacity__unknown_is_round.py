"""chapters.moe.routing.capacity: an unknown rule is "round"."""


def capacity(
    tokens: int, experts: int, k: int = 1, factor: float = 1.0, rule: str = "round", multiple: int = 1, least: int = 1
) -> int:
    for name, value in (("tokens", tokens), ("experts", experts), ("k", k), ("multiple", multiple), ("least", least)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rules = {"round": round, "ceil": math.ceil, "floor": math.floor}
    if rule is None:
        raise ValueError(f"rule must be one of {', '.join(rules)}, got {rule!r}")
    if not 0 < factor < math.inf:
        raise ValueError(f"factor must be positive and finite, got {factor}")
    places = max(rules.get(rule, round)(factor * k * tokens / experts), least)
    return -(-places // multiple) * multiple

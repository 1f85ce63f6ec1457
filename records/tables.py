"""A summary's figures as text, plain or Markdown: `tables(summarise(folder))`.

`-` stands for what the runs do not give: an interval of one run, the joules of a CPU.
"""

from __future__ import annotations

from records.stats import FEWEST_RESAMPLED

NONE = {"value": None, "low": None, "high": None}


def number(value: float | None, digits: int = 4, scale: float = 1.0, sign: bool = False) -> str:
    """`-` for what is not there."""
    if value is None:
        return "-"
    return f"{value * scale:{'+' if sign else ''},.{digits}f}"


def interval(est: dict, digits: int = 4, scale: float = 1.0, sign: bool = False) -> str:
    if est["low"] is None:
        return "-"
    return "{} to {}".format(*(number(est[k], digits, scale, sign) for k in ("low", "high")))


def loss_table(schedule: dict) -> list[list[str]]:
    head = ["arm", "n", "loss", "95 %", "sd", "95 % of sd", "bits/byte", "train - dev"]
    rows = [
        [
            *(arm, str(a["n"]), number(a["loss"]["value"]), interval(a["loss"])),
            *(number(a["sd"]["value"], 5), interval(a["sd"], 5)),
            *(number(a["bits_a_byte"]), number(a["train_minus_dev"], sign=True)),
        ]
        for arm, a in schedule["arms"].items()
    ]
    return [head, *rows]


def cost_table(schedule: dict) -> list[list[str]]:
    head = ["arm", "train s", "ms a step, by stage", "tokens/s", "peak GB", "active M"]
    head += ["stored M", "attention M", "GFLOP/token", "kJ"]
    rows = []
    for arm, a in schedule["arms"].items():
        params = [number(a["params"][k], 2, 1e-6) for k in ("active_matmul", "stored", "attention")]
        rows.append(
            [
                *(arm, number(a["train_s"]["mean"], 2)),
                " / ".join(number(s["ms"], 1) for s in a["ms_by_stage"].values()),
                *(number(a["tokens_per_s"], 0), number(a["peak_alloc"], 2, 1e-9), *params),
                *(number(a["flops_per_token"], 3, 1e-9), number(a["joules"], 1, 1e-3)),
            ]
        )
    return [head, *rows]


def pair_table(schedule: dict) -> list[list[str]]:
    head = ["pair", "n", "difference", "95 %", "sd", "time ratio", "95 %", "break-even", "95 %"]
    rows = []
    for p in schedule["pairs"]:
        row = [f"{p['arm']} - {p['against']}", str(p["n"])]
        if p["n"]:
            d, t, even = p["difference"], p["time_ratio"], p["break_even"]
            row += [number(d["value"], sign=True), interval(d, sign=True), number(p["sd"])]
            row += [number(t["value"], 3), interval(t, 3)]
            percent = {"digits": 1, "scale": 100, "sign": True}
            shown = even and [f"{number(even['value'], **percent)} %", interval(even, **percent)]
            row += shown or ["-", "-"]
        rows.append(row + ["-"] * (len(head) - len(row)))
    return [head, *rows]


def position_table(schedule: dict) -> list[list[str]]:
    """Loss by position, and under it the differences with their intervals."""
    names = list(dict.fromkeys(k for a in schedule["arms"].values() for k in a["by_position"]))
    rows = [
        [arm, *(number(a["by_position"].get(k)) for k in names)]
        for arm, a in schedule["arms"].items()
    ]
    for p in schedule["pairs"]:
        parts = p.get("by_position", {})
        values, ends = [], []
        for k in names:
            d = parts.get(k, NONE)
            values.append(number(d["value"], sign=True))
            ends.append(interval(d, sign=True))
        pair = f"{p['arm']} - {p['against']}"
        rows += [[pair, *values], [f"{pair}, 95 %", *ends]]
    return [["position in the document", *names], *rows]


def fit_table(times: dict) -> list[list[str]]:
    head = ["arm", "a", "b", "95 % of b", "tokens/s", "95 %", "largest residual"]
    rows = [
        [
            *(arm, number(f["a"]["value"]), number(f["b"]["value"], 5), interval(f["b"], 5)),
            *(number(f["tokens_per_s"]["value"], 0), interval(f["tokens_per_s"], 0)),
            number(max(map(abs, f["residuals"])), 5),
        ]
        for arm, f in times["fits"].items()
    ]
    return [head, *rows]


def time_table(times: dict) -> list[list[str]]:
    head = ["pair", "at s", "difference", "95 %", "target", "seconds", "95 %", "time ratio", "95 %"]
    rows = []
    for p in times["pairs"]:
        equal, to = p["equal_time"], p["to_target"]
        d, s, r = equal["difference"] or NONE, to["seconds"] or NONE, to["ratio"] or NONE
        rows.append(
            [
                *(f"{p['arm']} - {p['against']}", number(equal["seconds"], 1)),
                *(number(d["value"], sign=True), interval(d, sign=True), number(to["target"])),
                *(number(s["value"], 1), interval(s, 1), number(r["value"], 3), interval(r, 3)),
            ]
        )
    return [head, *rows]


def nearest_table(times: dict) -> list[list[str]]:
    head = ["pair", "n", "its schedule", "time ratio", "95 %", "difference", "95 %"]
    rows = []
    for p in times["pairs"]:
        near = p["nearest"]
        if near is not None:
            d, t = near["difference"], near["time_ratio"]
            row = [f"{p['arm']} - {p['against']}", str(near["n"]), f"{near['tokens']:,}"]
            row += [number(t["value"], 3), interval(t, 3)]
            rows.append([*row, number(d["value"], sign=True), interval(d, sign=True)])
    return [head, *rows]


def decision_table(decision: list[dict]) -> list[list[str]]:
    rows = [
        [
            f"{d['arm']} against {d['against']}",
            *(str(d["n"]), "-" if d["p"] is None else f"{d['p']:.2g}"),
            "yes" if d["passed"] else "no",
        ]
        for d in decision
    ]
    return [["planned test", "n", "p", "passed"], *rows]


def render(rows: list[list[str]], markdown: bool) -> str:
    """A table: the first column to the left, figures to the right."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        rule = "| --- |" + " ---: |" * (len(rows[0]) - 1)
        return "\n".join([lines[0], rule, *lines[1:]])
    wide = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, wide)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def headline(said: dict) -> str:
    """What kind of evidence it is, in a few sentences."""
    plan, blocks, sittings = said["plan"], said["blocks"], len(said["sittings"])
    if said["stage"] == "screen":
        kind = said["kind"] if said["kind"] in ("baseline", "note") else "screen"
        kind = f"{kind.capitalize()}, {blocks} block{'s' * (blocks != 1)}, without a plan: no p."
    elif said["stage"] == "interim":
        lacks = f"plan {plan['name']} of {plan['blocks']} blocks lacks {len(plan['missing'])} runs"
        kind = f"*Interim*: {lacks}. Its intervals are interim, and nothing is decided."
    else:
        rule, n = plan["rule"], len(said["decision"])
        each = ", each comparison by itself" * (n > 1)
        kind = f"Plan {plan['name']}, complete: {rule['test']}, p < {rule['alpha']}{each}."
    where = (
        f"Preset {said['preset']} on {', '.join(said['machines'])}, {sittings} "
        f"sitting{'s' * (sittings != 1)}; losses are {said['metric']}, nats a token."
    )
    left_out = [
        f"{name.capitalize()}: {', '.join(said[name])}."
        for name in ("unfinished", "unplanned", "resumed")
        if said[name]
    ]
    return " ".join([kind, where, *left_out])


def tables(said: dict, markdown: bool = False) -> str:
    """`summarise`'s figures as text: the headline, then every table with its title."""
    out = [headline(said)]
    interim = " (interim)" if said["stage"] == "interim" else ""

    def add(title: str, rows: list[list[str]]) -> None:
        title = f"{title}{interim}"
        if len(rows) > 1:
            out.extend([f"**{title}**" if markdown else title, render(rows, markdown)])

    if said["decision"]:
        add("Decision", decision_table(said["decision"]))
    for schedule in reversed(said["schedules"]):
        at = f"{schedule['tokens']:,} tokens"
        if len(said["schedules"]) > 1:
            at += f", {schedule['fraction']} %"
        add(f"Loss after {at}", loss_table(schedule))
        add(f"Paired differences within blocks, {at}", pair_table(schedule))
        if schedule["fraction"] == said["full"]:
            add(f"Cost of {at}", cost_table(schedule))
            add(f"Loss by position, {at}", position_table(schedule))
    if said["time"]:
        lengths = said["time"]["lengths"]
        add(f"Fits of {lengths} lengths: loss = a + b ln(tokens)", fit_table(said["time"]))
        few = said["time"]["blocks"] < FEWEST_RESAMPLED
        note = f": no intervals from fewer than {FEWEST_RESAMPLED} whole blocks" if few else ""
        add(f"At equal time, and time to a loss, by the fits{note}", time_table(said["time"]))
        add("The schedule nearest in time, as it ran", nearest_table(said["time"]))
    return "\n\n".join(out)

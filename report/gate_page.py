"""What `python -m gate` shows of a gate.json: one screen for a person, and all of it as Markdown.

The screen says verdict, why and what to do next. The Markdown follows the conventions of evaluation
reports: mean, interval, standard error and n of everything, and paired differences.
"""
ILLS = ("empty", "cut", "loops", "spoilt")    # the last one of conversations, not of replies
MOST = 6        # reasons on the screen; all are in gate.md


def percent(found: dict) -> str:
    """example  93.5 [89.2, 96.2]"""
    if found["value"] is None:
        return "-"
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def points(difference: dict) -> str:
    """example  +93.5 points [+88.9, +96.0]"""
    if difference["value"] is None:
        return "no conversation that both decided"
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def found_of(rule: dict) -> str:
    return interval(rule) if "low" in rule else number(rule["value"])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def interval(found: dict) -> str:
    """example  .303 [.243, .368]"""
    if found["value"] is None:
        return "-"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def looks(plan: dict) -> list[str]:
    """One line on the earlier looks with which a plan shares its error, if there are any."""
    before = ", ".join(map(str, plan["earlier"].values()))
    return [f"look {plan['looks']} at this, {100 * plan['tail'] / 2 ** plan['looks']:g} % in each "
            f"tail: before it {before}"] * bool(before)


def screen(report: dict, steps: list[str]) -> str:
    """Verdict, why, what to do next (steps), and the figures behind it: one screen."""
    plan = report["plan"]
    lines = [f"{report.get('verdict', 'no verdict: no instruct model')}   ({report['name']}: "
             f"{plan['n']} of {report['benchmark']['path']}, plan {plan['sha256'][:8]})",
             *looks(plan), ""]
    lines += [f"! {warning}" for warning in report["warnings"][:MOST]]
    reasons = report.get("reasons", [])
    lines += [f"- {reason}" for reason in reasons[:MOST]]
    lines += [f"- {len(reasons) - MOST} more in gate.md"] * (len(reasons) > MOST)
    if "verdict" in report:
        lines.append(f"  {'rule (worst case over undecided)':<36}{'wanted':>7}  "
                     + "".join(f"{s:<28}" for s in report["scorers"]))
        for rules in zip(*(report["rules"][s] for s in report["scorers"])):
            cells = (f"{found_of(r):<22}{r['holds']:<6}" for r in rules)
            lines.append(f"  {rules[0]['rule']:<36}{rules[0]['wanted']:>7.4g}  {''.join(cells)}")
        for pair, cells in report["agreement"].items():
            judged = [f"{name} {number(c['value'])}" for name, c in cells.items() if c["judged"]]
            lines.append(f"  {pair} agree, kappa: {', '.join(judged) or 'cannot be judged'}; all "
                         f"of one class: {len(cells) - len(judged)} conditions")
    lines += [""] * bool(lines[-1]) + [
        f"  {'condition':<24}" + "".join(f"{'% by ' + s:<20}" for s in report["scorers"])
        + f"{'undecided':<11}{'tokens':<8}{', '.join(ILLS)} %"]
    for name, cell in report["conditions"].items():
        seen = cell["replies"]
        ills = ", ".join(f"{100 * seen[what]['value']:.0f}" for what in ILLS)
        undecided = "/".join(str(cell[s]["undecided"]) for s in report["scorers"])
        lines.append(f"  {name:<24}" + "".join(f"{percent(cell[s]['rate']):<20}"
                                               for s in report["scorers"])
                     + f"{undecided:<11}{seen['median_tokens']:<8g}{ills}"
                     + "  not fit" * bool(seen["ill"]))
    lines += ["", *(f"next: {step}" for step in steps)]
    return "\n".join(lines)


def details(report: dict) -> str:
    """All of it as Markdown: mean, interval, standard error and n of everything."""
    plan, scorers, conditions = report["plan"], report["scorers"], report["conditions"]
    share = lambda name, what: interval(conditions[name]["replies"][what])
    rates = [[name, s, part, interval(r), number(r["stderr"]), r["n"],
              cell[s]["undecided"] if part == "all" else ""]
             for name, cell in conditions.items() for s in scorers
             for part, r in {"all": cell[s]["rate"], **cell[s]["by_category"]}.items()]
    sections = {
        "Models | role | model | weights": [
            [role, m["name"], m["weights"][:16]] for role, m in report["models"].items()],
        "Rates | condition | scorer | category | mean [95 %] | stderr | n | undecided": rates,
        "Replies | condition | median tokens | empty | cut | loops | spoilt conversations": [
            [name, c["replies"]["median_tokens"], *(share(name, what) for what in ILLS)]
            for name, c in conditions.items()],
        "Paired differences | pair | points [95 %] | stderr | only first | only second | "
        "McNemar p | Cohen's h | n": [
            [pair, points(t["difference"]), number(t["difference"]["stderr"]), t["only_first"],
             t["only_second"], f"{t['p']:.2g}", number(t["h"]), t["n"]]
            for pair, t in report["paired"].items()],
        "Rules | scorer | rule | wanted | found | holds | n for it": [
            [s, r["rule"], f"{r['wanted']:.4g}", found_of(r), r["holds"], r["needed"] or ""]
            for s in scorers for r in report.get("rules", {}).get(s, [])],
        "Agreement within conditions | scorers | condition | agreement | kappa [95 %] | AC1 | n | "
        "holds": [
            [pair, name, number(c["agreement"]), interval(c), number(c["ac1"]), c["n"],
             c["holds"] if c["judged"] else "cannot be judged"]
            for pair, cells in report.get("agreement", {}).items() for name, c in cells.items()],
        "People's labels | scorer | n | kappa [95 %] | AC1 | sensitivity | specificity | "
        "corrected rates | missing": [
            [s, c["n"], interval(c), number(c["ac1"]), interval(c["sensitivity"]),
             interval(c["specificity"]), "; ".join(f"{name} {interval(r)}" for name, r in
                                                   c["corrected"].items()), "; ".join(c["why"])]
            for s, c in report["people"].items()]}
    lines = [f"# Gate {report['name']}: {report.get('verdict', 'no verdict')}", "",
             *(f"- **{warning}**" for warning in report["warnings"]),
             *(f"- {reason}" for reason in report.get("reasons", [])), "",
             f"Plan {plan['sha256']}, look {plan['looks']} at these conversations. Intervals of "
             "95 %: Wilson's of a rate over what was decided, Bonett and Price's of a paired "
             f"difference. Rules: exact ones with {100 * plan['tail'] / 2 ** plan['looks']:g} % in "
             "each tail; what is undecided counts against the gap."]
    for head, rows in sections.items():
        title, _, columns = head.partition(" | ")
        lines += ["", f"## {title}", "", f"| {columns} |", "|---" * columns.count(" | ") + "|---|",
                  *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
    lines += ["", "## Three conversations of each condition"]
    for name, chats in report["transcripts"].items():
        lines += ["", f"### {name}", *(f"\n```\n{chat.replace('```', chr(39) * 3)}\n```"
                                       for chat in chats)]
    return "\n".join(lines) + "\n"

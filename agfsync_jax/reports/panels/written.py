"""What a language model wrote: what was kept of it, what was not for which reason, what it cost."""

from agfsync_jax.reports import charts
from agfsync_jax.reports.charts import ALL, BETTER, WORSE
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report
from agfsync_jax.utils.clock import duration


def show(report: Report) -> dict:
    rounds = [each for each in report.rounds if each.written]
    parts = [
        (
            f"{each.label}: {what}" if len(report.rounds) > 1 else what,
            _part(what, found, each.stages),
        )
        for each in rounds
        for what, found in each.written.items()
    ]
    if not parts:
        return {}
    note = "Each thing that was dropped is counted once, under the first reason that holds."
    return {"parts": parts, "better": BETTER, "note": note}


def _part(what: str, found: dict, stages: dict) -> dict:
    read = max(found["read"], 1)
    rows = [("kept", found["rows"], found["rows"] / read, BETTER, found.get("kept_examples", []))]
    rows += [
        (why, count, count / read, ALL, found["examples"].get(why, []))
        for why, count in found["dropped"].items()
    ]
    asked = max(found["requests"], 1)
    rows += [
        (why, count, count / asked, WORSE, found["examples"].get(why, []))
        for why, count in found["lost"].items()
    ]
    facts = [
        f"{found['requests']:,} answers in {found['waves']} wave{'s' * (found['waves'] > 1)}",
        f"{found['prompt_tokens']:,} tokens in, {found['completion_tokens']:,} out",
    ]
    if seconds := stages.get(what, {}).get("seconds"):
        facts.append(f"{duration(seconds)} with what is held out")
    if found.get("price") is not None:
        facts.append(f"price {found['price']:,.2f}")
    if found["asked_for"] > (there := found.get("prompts", found["rows"])):
        facts.append(
            f"{found['asked_for'] - there:,} of {found['asked_for']:,} prompts are missing"
        )
    facts += [f"{count:,} {remark}" for remark, count in found["remarks"].items()]
    most = max(found["kept"].values())
    kept = [(name, count, count / most) for name, count in found["kept"].items()]
    chart = None
    if per_prompt := found.get("per_prompt"):
        numbers = sorted(map(int, per_prompt))
        counts = [per_prompt[str(number)] for number in numbers]
        title = "Prompts by their number of questions"
        chart = charts.bars(title, list(map(str, numbers)), {"prompts": counts}, colors=(BETTER,))
    by = "By type" if chart else "By category"
    return {
        "read": found["read"],
        "rows": rows,
        "facts": facts,
        "by": by,
        "kept": kept,
        "chart": chart,
    }


TEMPLATE = """
{% for what, part in parts %}
<details{% if loop.index <= 2 %} open{% endif %}><summary>{{ what }}</summary>
<p class="note">{{ part.facts|join(" · ") }}</p>
<div class="cards">
<div class="card"><h3>{{ "{:,}".format(part.read) }} that were read</h3>
<table class="counts"><tbody>
{% for why, number, share, color, examples in part.rows %}
<tr><td>{% if examples %}<details><summary>{{ why }}</summary>
<ul>{% for each in examples %}<li>{{ m.text(each) }}</li>{% endfor %}</ul></details>
{% else %}{{ why }}{% endif %}{{ m.bar([share, 1]|min, color) }}</td>
<td>{{ "{:,}".format(number) }}</td><td>{{ share|percent }}</td></tr>
{% endfor %}
</tbody></table></div>
<div class="card"><h3>{{ part.by }}</h3>
<table class="counts"><tbody>
{% for name, number, share in part.kept %}
<tr><td>{{ name }}{{ m.bar(share, better) }}</td><td>{{ "{:,}".format(number) }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if part.chart %}<div class="card">{{ m.chart(part.chart) }}</div>{% endif %}
</div>
</details>
{% endfor %}
"""
PANEL = Panel("report", 105, show, "What the language model wrote", TEMPLATE)

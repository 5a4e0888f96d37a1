"""What the study of AMSS leaves behind to read: its summary and its report. The pictures are in amss_plots."""

from __future__ import annotations

import statistics

from .amss_arms import METHODS, OPTIMIZER_TITLES, OPTIMIZERS, TITLES
from .amss_data import DATA_SETS, FEWEST, clipart_facts
from .comparing import comparison, gain_text, listed, mean_deviation, mean_text, provenance_line

METRICS = {"accuracy": "accuracy, %", "macro_f1": "macro-F1, %"}
COMPARED = tuple(arm for arm in TITLES if arm != "joint")
RIVALS = ("uniform", "topk", "ogm", "single")  # what masks by importance must beat besides joint training
MASKED = ("amss", "amss_plus")
SETTINGS = tuple((data_set, optimizer) for data_set in DATA_SETS for optimizer in OPTIMIZERS)


def key_of(data_set, optimizer: str) -> str:
    return f"{data_set.name}-{optimizer}"


def title_of(data_set, optimizer: str) -> str:
    return f"{data_set.title}, {OPTIMIZER_TITLES[optimizer]}"


def _mean_history(histories: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """{modality: a value an epoch}, the mean of the seeds."""
    return {
        name: [statistics.mean(values) for values in zip(*(history[name] for history in histories), strict=True)]
        for name in histories[0]
    }


def gap_of(own_accuracy: dict[str, list[float]], strong: str) -> list[float]:
    """The modality gap of each epoch, in points: accuracy of the strong modality minus the mean of the others'."""
    others = [values for name, values in own_accuracy.items() if name != strong]
    means = [statistics.mean(values) for values in zip(*others, strict=True)]
    return [100 * (a - b) for a, b in zip(own_accuracy[strong], means, strict=True)]


def summarise(runs: list[dict]) -> dict:
    """Of each setting: metrics of each arm over the seeds, gains in points of accuracy, ratios and gaps over epochs."""
    summary = {}
    for data_set, optimizer in SETTINGS:
        own = [run for run in runs if (run["data_set"], run["optimizer"]) == (data_set.name, optimizer)]

        def values(results: list[dict], metric: str) -> list[float]:
            return [100 * result["metrics"][metric] for result in results]

        def gains(arm: str, other: str, own=own, values=values) -> list[float]:
            pairs = zip(*(values([run["arms"][name] for run in own], "accuracy") for name in (arm, other)), strict=True)
            return [a - b for a, b in pairs]

        unimodal = {}
        for name in data_set.modalities:
            results = [run["unimodal"][name] for run in own]
            unimodal[name] = {
                "metrics": {metric: mean_deviation(values(results, metric)) for metric in METRICS},
                "validation_accuracy": statistics.mean(result["validation_accuracy"] for result in results),
            }
        strong = max(unimodal, key=lambda name, unimodal=unimodal: unimodal[name]["validation_accuracy"])
        arms = {}
        for arm in TITLES:
            results = [run["arms"][arm] for run in own]
            arms[arm] = {
                "metrics": {metric: mean_deviation(values(results, metric)) for metric in METRICS},
                "seconds": statistics.mean(result["seconds"] for result in results),
                "best_epoch": statistics.mean(result["best_epoch"] for result in results),
            }
            if arm != "joint":
                arms[arm]["over_joint"] = comparison(gains(arm, "joint"))
            if arm in MASKED:
                arms[arm]["over"] = {rival: comparison(gains(arm, rival)) for rival in RIVALS}
            if arm != "single":
                own_accuracy = _mean_history([result["own_accuracy"] for result in results])
                arms[arm] |= {
                    "own_accuracy": own_accuracy,
                    "gap": gap_of(own_accuracy, strong),
                    "ratio": _mean_history([result["ratio"] for result in results]),
                }
        summary[key_of(data_set, optimizer)] = {
            "rows": own[0]["rows"],
            "strong": strong,
            "arms": arms,
            "unimodal": unimodal,
        }
    return summary


def verdicts(results: dict) -> list[str]:
    """One line an arm, then what follows; all from the numbers."""
    if results["seeds"] < 2:
        return ["One seed: no verdict."]
    settings = results["settings"]

    def where(arm: str, verdict: str, rival: str = "joint") -> list[str]:
        arms = {name: setting["arms"][arm] for name, setting in settings.items()}
        gains = {name: own["over_joint"] if rival == "joint" else own["over"][rival] for name, own in arms.items()}
        return [name for name, gain in gains.items() if gain["verdict"] == verdict]

    lines = [
        f"{TITLES[arm]}: clearly better than joint training in {listed(where(arm, 'better'))}; "
        f"worse in {listed(where(arm, 'worse'))}."
        for arm in COMPARED
    ]
    helpful = [TITLES[arm] for arm in COMPARED if where(arm, "better") and not where(arm, "worse")]
    lines.append(
        f"**Clearly better than joint training somewhere and clearly worse nowhere:** {', '.join(helpful) or 'no arm'}."
    )
    none = [name for name in settings if not any(name in where(arm, "better") for arm in MASKED)]
    lines.append(f"**Neither AMSS nor AMSS+ clearly beats joint training in:** {listed(none)}.")
    for arm in MASKED:
        parts = [
            f"{TITLES[rival]}: better in {listed(where(arm, 'better', rival))}, worse in "
            f"{listed(where(arm, 'worse', rival))}"
            for rival in RIVALS
        ]
        lines.append(f"**{TITLES[arm]} against** {'; '.join(parts)}.")
    return lines


def _overview(results: dict) -> list[str]:
    """Points gained over joint training: arms down, settings across; what is clear is bold."""
    settings = results["settings"]
    lines = [f"| points gained | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
    for arm in COMPARED:
        cells = []
        for setting in settings.values():
            gain = setting["arms"][arm]["over_joint"]
            text = gain_text(gain)
            cells.append(text if gain["verdict"] == "unclear" else f"**{text}**")
        lines.append(f"| {TITLES[arm]} | {' | '.join(cells)} |")
    return lines


def _metric_cells(metrics: dict) -> str:
    return " | ".join(mean_text(*values, 1) for values in metrics.values())


def _table(setting: dict) -> list[str]:
    lines = [
        f"| arm | {' | '.join(METRICS.values())} | points gained | seeds better | verdict | gap, points |",
        "|---" * 7 + "|",
    ]
    for arm, title in TITLES.items():
        own = setting["arms"][arm]
        gap = f"{own['gap'][-1]:.1f}" if "gap" in own else ""
        if arm == "joint":
            lines.append(f"| {title} | {_metric_cells(own['metrics'])} | | | | {gap} |")
            continue
        gain = own["over_joint"]
        verdict = gain["verdict"] if gain["seeds"] > 1 else ""
        lines.append(
            f"| {title} | {_metric_cells(own['metrics'])} | {gain_text(gain)} | {gain['seeds_better']} of "
            f"{gain['seeds']} | {verdict} | {gap} |"
        )
    for name, alone in setting["unimodal"].items():
        lines.append(f"| {name} alone | {_metric_cells(alone['metrics'])} | | | | |")
    return lines


def _modalities_table(setting: dict) -> list[str]:
    names = list(setting["unimodal"])
    lines = [
        f"| own accuracy in the last epoch, % | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        "| (alone, at its best epoch) | "
        + " | ".join(f"{100 * alone['validation_accuracy']:.1f}" for alone in setting["unimodal"].values())
        + " |",
    ]
    for arm, title in TITLES.items():
        if arm != "single":
            own = setting["arms"][arm]["own_accuracy"]
            lines.append(f"| {title} | {' | '.join(f'{100 * own[name][-1]:.1f}' for name in names)} |")
    lines += ["", f"| rho, first and last epoch | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm in (*METHODS, "ogm"):
        ratio = setting["arms"][arm]["ratio"]
        title = TITLES[arm] if arm in METHODS else f"{TITLES[arm]}: its coefficient k"
        lines.append(f"| {title} | {' | '.join(f'{ratio[n][0]:.2f}, {ratio[n][-1]:.2f}' for n in names)} |")
    return lines


HOW = """
- Data: `cells`, is a cell well segmented, four microscope channels; test as the table says, validation a stratified
  fifth of the training cells by seed. `chicago`, daily ridership of a station as three classes, cut at the terciles of
  the training rows, with four modalities; train before 2012, validation 2012, test from 2013 on: ridership grew, so
  that few later days are in the middle class. `clipart`, the folder of a picture, from 48 x 48 pixels and its title:
  the {classes} folders with at least {fewest} pictures ({pictures} in all; the largest is {largest:.0f} % of the test
  rows). Titles that differ in case, digits or punctuation only are always in one split; a quarter of each folder is
  tested, the same one in every seed, a fifth of the rest validates, by seed. {named:.1f} % of the test titles hold a
  word of their folder's name; {without:.0f} % hold no word of any training title. Keywords are not used.
- Models: linear-ReLU-linear to 32 features a table or title (a bag of the training titles' words), three convolutions
  with batch norm to 64 features a picture; one linear layer over the concatenated features. Cosine to zero; SGD has
  momentum 0.9. No augmentation. The epoch with the best validation accuracy counts, of equal ones the one with the
  lower loss. All arms of a seed share initial weights and batches.
- Learning rate and weight decay were chosen for joint training on validation rows, for SGD and Adam apart: the smallest
  rate within half a point of the best. Alpha of OGM-GE was chosen with these, also on validation rows
  (`python -m mmbal.study.amss_tuning`); AMSS's values are its defaults. That favours joint training a little, and
  OGM-GE over AMSS.
- AMSS, AMSS+ mask in every step from the first to the last the gradients of the encoders' weights, not of biases and
  batch norm. Uniform: the same ratios, masks drawn without regard to gradients. Top-k: the same ratios, the units with
  the largest gradients.
- OGM-GE: modulates all parameters of the encoders and adds noise, as its paper says, in every epoch. The paper has two
  modalities and SGD; for four the ratio is to the mean score of the other three, and Adam is outside of it.
- Best single modality: of the models of one modality the one that is best on validation rows, in each seed.
- Own accuracy: validation rows that the part of the linear layer over one modality's features gets right (and its share
  of the bias). Gap: that of the strong modality (the best alone) minus the mean of the others, in the last epoch.
- Better and worse: the 95 % interval (Student's t) of the paired gain over the seeds leaves out zero. Seeds change
  initial weights, batches, masks and, but in `chicago`, the validation rows; never the test rows, so the interval says
  nothing of other test rows. Of {comparisons} comparisons with joint training about {chance} would be clear by chance.
""".strip()


def _how() -> str:
    facts = clipart_facts()
    comparisons = len(COMPARED) * len(SETTINGS)
    return HOW.format(
        classes=facts["classes"],
        pictures=f"{facts['pictures']:,}",
        fewest=FEWEST,
        largest=100 * facts["largest"],
        named=100 * facts["named"],
        without=100 * facts["without_known_word"],
        comparisons=comparisons,
        chance=max(1, round(0.05 * comparisons)),
    )


def _choices(results: dict) -> list[str]:
    lines = ["| setting | learning rate | weight decay | alpha of OGM-GE |", "|---|---|---|---|"]
    for name, choice in results["recipe"]["choices"].items():
        lines.append(f"| {name} | {choice['learning_rate']:g} | {choice['weight_decay']:g} | {choice['alpha']:g} |")
    return lines


def _cost(results: dict) -> list[str]:
    settings = results["settings"]
    lines = [f"| trained | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
    for arm, title in TITLES.items():
        cells = " | ".join(f"{setting['arms'][arm]['seconds']:.1f}" for setting in settings.values())
        lines.append(f"| {title} | {cells} |")
    return lines


def markdown(results: dict) -> str:
    """The report."""
    count = results["seeds"]
    lines = [
        "# AMSS: masking subnetworks of the modality that is ahead",
        "",
        f"{len(DATA_SETS)} data sets with {len(OPTIMIZERS)} optimizers each, {count} seed{'s' if count > 1 else ''}. "
        "Mean ± standard deviation over the seeds; gains are points of accuracy, paired with joint training of the "
        "same seed, mean ± standard error, positive is better.",
        "",
        "## Verdict",
        "",
        *_overview(results),
        "",
        "Bold: clear, better or worse.",
        "",
        *(f"- {line}" for line in verdicts(results)),
        "",
        "![Gain of each arm over joint training](amss.png)",
        "",
        "![Update ratios and modality gap over the epochs](amss-rho.png)",
    ]
    for data_set, optimizer in SETTINGS:
        setting = results["settings"][key_of(data_set, optimizer)]
        rows = setting["rows"]
        lines += [
            "",
            f"## {key_of(data_set, optimizer)}: {title_of(data_set, optimizer)}",
            "",
            f"{rows['train']} training, {rows['validation']} validation, {rows['test']} test rows. "
            f"The strong modality: {setting['strong']}.",
            "",
            *_table(setting),
            "",
            *_modalities_table(setting),
        ]
    lines += ["", "## How", "", _how(), "", *_choices(results), "", "## Cost", "", "Seconds of one training.", ""]
    lines += [*_cost(results), "", provenance_line(results), ""]
    return "\n".join(lines)

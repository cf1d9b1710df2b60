"""`bertpipe report RUN RUN ...`: a page from the folders of runs alone; their manifests say what the configs were.

A RUN is a pretrain or finetune artifact, or the `.partial` folder of one that is still going. One gives the report of
that run, with the artifacts of its parents as far as they lie beside it; several a page of them side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import ReportConfig, listed
from bertpipe.downstream.reporting import report, side_by_side
from bertpipe.downstream.reporting.facts import collect
from bertpipe.downstream.reporting.record import broken_lines
from bertpipe.errors import ArtifactError, ConfigError

STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Opened:
    """A run whose folder was opened."""

    folder: Path
    manifest: dict[str, Any]
    """Or what it will begin with."""

    @property
    def stage(self) -> str:
        """pretrain or finetune"""
        return self.manifest["stage"]

    @property
    def inputs(self) -> dict[str, Path]:
        """The folder and those of its parents that are whole and lie beside it, by stage."""
        found, waiting = {self.stage: self.folder}, [self.manifest]
        while waiting:
            for stage, fingerprint in (waiting.pop().get("parents") or {}).items():
                place = self.folder.parent / f"{stage}-{fingerprint[:12]}"
                if stage not in found and artifact.is_complete(place):
                    found[stage] = place
                    waiting.append(artifact.read_manifest(place))
        return found


def write(folders: list[Path], out: Path | None = None) -> list[str]:
    """Write the page of these runs, whole or not at all, to `out` or under its usual name in this folder.

    Returns lines to say. ArtifactError for a folder that is none of a run's.
    """
    runs = list({run.folder.resolve(): run for run in map(open_run, folders)}.values())
    if len(runs) == 1:
        out, inputs = out or Path("report.html"), runs[0].inputs
        facts = _facts(runs[0])
        page, what = report.render(facts, report.explorer_of(inputs)), str(runs[0].folder)
        states, broken = [facts], facts["broken"]
    else:
        out = out or Path("runs-side-by-side.html")
        states = [side_by_side.read(run.folder, run.manifest) for run in runs]
        page, what = side_by_side.render(states), f"{len(runs)} runs"
        broken = [line for run in states for line in run["broken"]]
    data = page.encode()
    with artifact.writing(out, len(data)), artifact.replacing(out) as temporary:
        temporary.write_bytes(data)
    lines = [f"{out}: {what}; {len(data) / 1e6:.1f} MB"]
    for run, state in zip(runs, states, strict=True):
        if (at := state.get("unfinished")) is not None:
            reached = f": step {at['step']:,} of {report.integer(at['steps'])}" if at else ""
            lines.append(f"{run.folder}: still going, or interrupted{reached}")
    return lines + [f"note: {line}" for line in broken_lines(broken)]


def _facts(run: Opened) -> dict[str, Any]:
    """What the report shows of a run. Where its model can't be loaded, or can't fill in the sentences of its settings,
    they are left out."""
    config = run.manifest.get("config", {})
    shown = ReportConfig.model_construct(**config.get("report", {}))  # of another version, maybe
    facts = collect(config, run.inputs, shown.title)
    try:
        return report.complete(facts, run.inputs, listed(shown.fill_mask))
    except (ArtifactError, ConfigError) as error:
        print(f"note: no fill-mask: {error}", flush=True)
        return report.complete(facts, run.inputs, [])


def open_run(folder: Path) -> Opened:
    """The run in `folder`, or, where the run has just begun or finished, in the folder beside it."""
    if folder.name in ("", ".."):  # of . and /
        folder = folder.resolve()
    other = folder.parent / folder.name.removesuffix(artifact.PARTIAL)
    if not folder.name.endswith(artifact.PARTIAL):
        other = folder.parent / (folder.name + artifact.PARTIAL)
    place = folder if folder.is_dir() or not other.is_dir() else other
    if not place.is_dir():
        raise ArtifactError(f"{folder}: no such folder; report takes pretrain and finetune artifacts, or settings")
    try:
        manifest = artifact.read_recipe(place)
    except ArtifactError:
        if (place / artifact.MANIFEST).is_file() or (place / artifact.RECIPE).is_file():
            raise
        raise ArtifactError(
            f"{place}: neither {artifact.MANIFEST} nor {artifact.RECIPE} here, so this is no run; report takes "
            f"pretrain and finetune artifacts"
        ) from None
    stage = manifest.get("stage") if isinstance(manifest, dict) else None
    if stage not in STAGES:
        raise ArtifactError(
            f"{place}: a {stage or 'folder without a stage'}, not a run; report takes pretrain and finetune artifacts"
        )
    if odd := _odd(manifest):
        raise ArtifactError(f"{place}: {odd} of its manifest is no section; another version made it, or it was changed")
    return Opened(place, manifest)


def _odd(manifest: dict[str, Any]) -> str | None:
    """What should be an object of the manifest and is none."""
    trees = {key: manifest.get(key, {}) for key in ("config", "parents", "environment", "counts", "raw", "files")}
    if isinstance(config := trees["config"], dict):
        trees |= {f"config.{section}": value for section, value in config.items()}
    return next((key for key, value in trees.items() if not isinstance(value, dict)), None)

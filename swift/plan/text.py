"""A plan as text for a terminal and as plain values for JSON, and the table of parameter counts as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from swift.data.store.shards import OPEN_SHARDS
from swift.plan.devices import GIB, TERA
from swift.plan.file_system import RESUME_OPENS
from swift.plan.flops import flops_by_part, model_flops
from swift.plan.planning import Plan, available_bytes, why_not
from swift.plan.step_time import StepTime, recomputed_flops, traffic

GIGA = 1e9
MEGA = 1e6
WIDTH = 26


def _row(name: str, *cells: str) -> str:
    return f"  {name:<{WIDTH}}" + "".join(f"{cell:>14}" for cell in cells)


def _head(plan: Plan) -> list[str]:
    cfg, geometry, sharding = plan.cfg, plan.geometry, plan.sharding
    x, y, z, t = geometry.volume
    patch = ",".join(map(str, geometry.patch))
    precision = "bf16" if sharding.bf16 else "float32"
    precision += " (gradients summed in float32)" if sharding.wide else ""
    groups = f" in groups of {sharding.group:,}" if sharding.group else ""
    groups += " for a second copy of the weights" if sharding.group and sharding.zero_stage else ""
    return [
        f"model {cfg.model.name} ({cfg.model.variant}), clip {x}x{y}x{z} voxels x {t} frames, "
        f"patch {patch}: {geometry.tokens:,} tokens"
        + ("" if geometry.cells is None else f" of visible {geometry.cells.shown} (task.hidden=drop)")
        + _shares(plan),
        f"parallel={sharding.strategy}, {precision}, activation checkpointing {sharding.checkpointing}, "
        f"{plan.nodes:,} node{'s' if plan.nodes > 1 else ''} of {plan.site.name} "
        f"({plan.site.device_name}): {sharding.ranks:,} rank{'s' if sharding.ranks > 1 else ''}{groups}",
        f"micro-batch {plan.micro_batch}, {sharding.accumulate} accumulated: {plan.global_batch:,} clips a step",
    ]


def _shares(plan: Plan) -> str:
    """With tokens=brain, how much of the grid is computed."""
    if plan.cfg.model.tokens == "box" or plan.geometry.cells is not None:
        return ""
    shares = ", ".join(f"{100 * stage.share:.0f} %" for stage in plan.geometry.stages)
    return (
        f" (brain tokens of an ellipsoid like a brain; of the cells of stages 1-{len(plan.geometry.stages)}: {shares})"
    )


def _parts(plan: Plan) -> list[str]:
    flops = flops_by_part(plan.geometry)
    lines = ["", _row("by part", "parameters", "TFLOP forward", "and backward")]
    for name, parameters in plan.geometry.parameters.items():
        part = flops.get(name)
        done = [f"{part.forward / TERA:.3f}", f"{part.total / TERA:.3f}"] if part else ["", ""]
        lines.append(_row(name, f"{parameters:,}", *done))
    total = model_flops(plan.geometry)
    forward, both = f"{total.forward / TERA:.3f}", f"{total.total / TERA:.3f}"
    lines.append(_row("total, one clip", f"{plan.geometry.total_parameters:,}", forward, both))
    again = recomputed_flops(plan.geometry, plan.sharding.checkpointing)
    step = f"one step: {total.total * plan.global_batch / TERA:,.1f} TFLOP"
    lines.append(f"  {step}" + (f", and {again * plan.global_batch / TERA:,.1f} recomputed" if again else ""))
    return lines


def _memory(plan: Plan) -> list[str]:
    names = list(plan.options)
    title = [f"{name}{' *' if name == plan.sharding.checkpointing else ''}" for name in names]
    lines = ["", _row("memory a device, GiB", *title) + "   activation checkpointing (* as set)"]
    for kind in plan.chosen.memory.kinds():
        lines.append(_row(kind, *(f"{plan.options[name].memory.kinds()[kind] / GIB:,.2f}" for name in names)))
    lines.append(_row("total", *(f"{plan.options[name].memory.total / GIB:,.2f}" for name in names)))
    have = f"fits in {available_bytes(plan.site) / GIB:,.1f}"
    lines.append(_row(have, *("yes" if plan.options[name].fits else "NO" for name in names)))
    lines.append(_row("largest micro-batch", *(f"{plan.options[name].largest}" for name in names)))
    lines.append(f"  the peak is in the {plan.chosen.memory.moment}")
    if plan.chosen.memory.host:
        lines.append(f"  and {plan.chosen.memory.host / GIB:,.1f} GiB a rank on the host (offload)")
    return lines


def _traffic(plan: Plan) -> list[str]:
    sent = traffic(plan.geometry, plan.sharding)
    if not sent.network and not sent.host:
        return ["", "communication: none"]
    parts = [f"gradients {sent.gradients / GIGA:,.2f} GB"]
    within = f" ({sent.inside / GIGA:,.2f} of them inside groups)" if sent.inside else ""
    parts += [f"weights {sent.weights / GIGA:,.2f} GB{within}"] if sent.weights else []
    parts += [f"gradients between groups {sent.across / GIGA:,.2f} GB"] if sent.across else []
    parts += [f"to and from the host {sent.host / GIGA:,.2f} GB"] if sent.host else []
    return ["", f"sent by each rank in a step: {', '.join(parts)}"]


def _timing(plan: Plan, time: StepTime, micro_batch: int) -> list[str]:
    hours = time.node_hours(plan.clips, plan.nodes)
    between = f", between groups {time.across:.3f}" if time.across else ""
    return [
        f"predicted step at micro-batch {micro_batch}: {time.seconds:.3f} s = compute {time.compute:.3f} + exposed "
        f"communication {time.exposed:.3f} (of {time.communication:.3f}{between}) + optimizer {time.optimizer:.3f}",
        f"  {time.clips_per_second:,.1f} clips/s, MFU {100 * time.mfu:.1f} % "
        f"(with recomputation {100 * time.hfu:.1f} %), {hours:,.0f} node-hours for {plan.clips:,.0f} clips",
    ]


def _amount(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIGA:,.1f} GB" if size >= GIGA else f"{size / MEGA:,.2f} MB"


def _input(plan: Plan) -> list[str]:
    """What the clips cost the file system."""
    files, rate = plan.files, plan.site.filesystem
    of = "means of the store" if files.scans.known else f"{files.scans.voxels:,.0f} brain voxels, assumed"
    line = f"files: a clip is {_amount(files.clip)} read ({of})"
    if plan.cfg.data.stage_dir:
        return [f"{line}; from the nodes' own disks (data.stage_dir), which get their copies at the start"]
    if not files.input:
        return [line]
    lines = [f"{line}, {_amount(files.input)}/s by all ranks"]
    if rate is None or files.nodes is None:
        lines.append("  no limit known: the site names no filesystem_gb_s")
    elif files.input > rate:
        lines.append(f"  MORE than the file system's {rate / GIGA:,.0f} GB/s, which serve {files.nodes:,} such nodes")
    else:
        share = f"{100 * files.input / rate:.2g} % of the file system's {rate / GIGA:,.0f} GB/s"
        lines.append(f"  {share}, which would serve {files.nodes:,} such nodes")
    if files.reopened:
        lines.append(f"  {files.reopened:,.1f} files a second opened again: a rank keeps {OPEN_SHARDS} shards open")
    return lines


def _files(plan: Plan) -> list[str]:
    """What the run asks of the file system that all nodes share."""
    files = plan.files
    lines = [
        *("", *_input(plan)),
        f"  up to its first step a rank opens {files.opens} files at most, and {RESUME_OPENS} more to go on from a "
        "checkpoint (imports not counted)",
    ]
    seconds = (
        "" if files.checkpoint_seconds is None else f", {files.checkpoint_seconds:.2g} s at the file system's rate"
    )
    size = _amount(files.checkpoint_bytes)
    lines.append(f"  a checkpoint is {files.checkpoint_files:,} files, {size} and their headers{seconds}")
    if files.heartbeats is not None and files.log_writes is not None:
        beats, logs = f"{files.heartbeats:.2g} heartbeats", f"{files.log_writes:.2g} times to its logs"
        lines.append(f"  rank 0 writes {beats} and {logs} a second")
    return lines


def _steps(number: int) -> str:
    return "step" if number == 1 else f"{number:,} steps"


def _goodput(plan: Plan) -> list[str]:
    """What failures and saves leave of the time."""
    found = plan.goodput
    if found is None:
        why = "the site names no failure_hours" if plan.time else "no step time"
        return [f"goodput: not known ({why})"]
    return [
        f"goodput {100 * found.share:.1f} %, saving every {_steps(found.every)}, with a failure every "
        f"{found.between / 3600:,.1f} h and {plan.site.restart:.0f} s to go on",
        f"  at most {100 * found.best_share:.1f} %, saving every {_steps(found.best_every)} (Young's rule; metadata "
        "of the files not counted)",
    ]


def _assumptions(plan: Plan) -> list[str]:
    site = plan.site
    lines = ["", "Assumed, not measured:"]
    if plan.time is not None:
        lines += [
            f"  matrix products reach {100 * site.matmul_fraction:.0f} % of peak, elementwise operations "
            f"{100 * site.bandwidth_fraction:.0f} % of the memory bandwidth, collectives "
            f"{100 * site.link_fraction:.0f} % of a link",
            "  in the step time data arrive in time and no checkpoint is written; torch.compile is not counted",
        ]
    lines.append(
        f"  {100 * site.usable_memory:.0f} % of the device's {site.device_memory / GIB:.1f} GiB can be used; attention "
        "keeps no score matrix (flash or memory-efficient kernels)"
    )
    if plan.site.name != "local":
        lines.append(f"  conf/sites/{plan.site.name}.yaml holds these values: measure there, then change them")
    return lines


def plan_text(plan: Plan) -> str:
    """Everything of a plan, in lines of at most about 120 characters."""
    lines = [*_head(plan), *_parts(plan), *_memory(plan), *_traffic(plan)]
    largest = plan.chosen.largest
    if plan.time is None:
        lines.append(f"no step time and no MFU: the peak of {plan.site.device_name} is not known (swift.plan.devices)")
    else:
        lines += _timing(plan, plan.time, plan.micro_batch)
        if plan.time_largest is not None and largest != plan.micro_batch:
            lines += _timing(plan, plan.time_largest, largest)
    lines += [*_files(plan), *_goodput(plan)]
    lines.append("")
    if plan.chosen.fits:
        lines.append(f"FITS, with micro-batch up to {largest}")
        if plan.faster:
            lines.append(f"  faster: {plan.faster}")
    else:
        lines.append(f"DOES NOT FIT: {why_not(plan)}")
        found = plan.suggestions or ["nothing tried: shard it (parallel=zero1 and on), on more nodes or larger devices"]
        lines += [f"  would fit: {each}" if plan.suggestions else f"  {each}" for each in found]
    return "\n".join([*lines, *_assumptions(plan)])


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, FLOPs, seconds."""
    sent = traffic(plan.geometry, plan.sharding)

    def timing(time: StepTime | None) -> dict[str, Any] | None:
        if time is None:
            return None
        return asdict(time) | {
            "seconds": time.seconds,
            "clips_per_second": time.clips_per_second,
            "node_hours": time.node_hours(plan.clips, plan.nodes),
        }

    return {
        "model": plan.cfg.model.name,
        "parallel": plan.sharding.strategy,
        "checkpointing": plan.sharding.checkpointing,
        "precision": "bf16" if plan.sharding.bf16 else "32",
        "site": plan.site.name,
        "device": plan.site.device_name,
        "nodes": plan.nodes,
        "ranks": plan.sharding.ranks,
        "micro_batch": plan.micro_batch,
        "global_batch": plan.global_batch,
        "clip": list(plan.geometry.volume),
        "tokens": plan.geometry.tokens,
        "parameters": plan.geometry.parameters | {"total": plan.geometry.total_parameters},
        "flops_per_clip": {name: asdict(part) for name, part in flops_by_part(plan.geometry).items()}
        | {
            "total": model_flops(plan.geometry).total,
            "recomputed": recomputed_flops(plan.geometry, plan.sharding.checkpointing),
        },
        "flops_per_step": model_flops(plan.geometry).total * plan.global_batch,
        "device_memory": plan.site.device_memory,
        "available": available_bytes(plan.site),
        "memory": {
            kept: option.memory.kinds()
            | {
                "total": option.memory.total,
                "peak": option.memory.moment,
                "host": option.memory.host,
                "fits": option.fits,
                "largest_micro_batch": option.largest,
            }
            for kept, option in plan.options.items()
        },
        "sent_per_step": asdict(sent) | {"network": sent.network},
        "step": timing(plan.time),
        "step_at_largest_micro_batch": timing(plan.time_largest),
        "clips": plan.clips,
        "fits": plan.chosen.fits,
        "suggestions": plan.suggestions,
        "filesystem": plan.site.filesystem,
        "files": asdict(plan.files) | {"scans": asdict(plan.files.scans) if plan.files.scans.known else None},
        "goodput": None if plan.goodput is None else asdict(plan.goodput),
        "faster": plan.faster,
    }


def counts_text(rows: list[dict[str, Any]]) -> str:
    """The counts as aligned text."""
    lines = [f"{'variant':<11} {'model':<6} {'E':>5}  {'depths':<10} {'encoder':>15} {'+ local':>10} {'+ linear':>14}"]
    for row in rows:
        depths = ",".join(map(str, row["depths"]))
        lines.append(
            f"{row['variant']:<11} {row['model']:<6} {row['embed_dim']:>5}  {depths:<10} {row['encoder']:>15,} "
            f"{row['decoder_local']:>10,} {row['decoder_linear']:>14,}"
        )
    return "\n".join(lines)

"""Every setting of swift, typed (those of `data` in schema_data.py). Values live in conf/*.yaml; here are names, types
and meaning.

Plain dataclasses without any dependency, so that `swift.models` and `swift.data` may import them. Fields without a
default must be given by a YAML file. A default stands where older runs and exported models do not have the setting yet:
what it was before there was one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from swift.config.schema_data import DataConfig


@dataclass
class ModelConfig:
    """Architecture of the 4D Swin encoder and its pre-training decoder."""

    name: str
    """Shown in run names and tables."""
    embed_dim: int
    """Width E of stage 1; stages have E, 2E, 4E, 8E."""
    depths: list[int]
    """Blocks in each stage."""
    num_heads: list[int]
    """Attention heads in each stage; each divides its stage's width."""
    variant: str
    """The preset the other fields came from (a label: model/variant= chooses it)."""
    patch_size: list[int]
    """Voxels x, y, z and frames of one patch."""
    patch_norm: bool
    """LayerNorm after the patch embedding."""
    position: str
    """absolute: learned tables at the entry of every stage | rope | rope_global: rope + axial tables after the patch
    embedding | none."""
    attention: str
    """joint: one 4D window | factorized: a space window, then a time window."""
    window: list[int]
    """Tokens x, y, z, t of a window. Factorized attention uses x, y, z for space and t for time."""
    last_stage: str
    """windowed: like the others | full: one window over the whole grid | unshifted: windowed, never shifted."""
    order: str
    """Factorized: st, space then time | ts."""
    mlp: str
    """Factorized: shared, one MLP a block | each, one after each attention."""
    mlp_ratio: float
    """Width of the hidden layer of an MLP, as a multiple of its stage's."""
    layer_scale: Optional[float]
    """Initial LayerScale of every residual branch; null for none."""
    final_norm: bool
    """Apply the final LayerNorm (its parameters exist either way, as in SwiFT v1)."""
    rope_base: float
    """Base of the rotary frequencies."""
    dropout: float
    """After the patch embedding, attention projections and MLP layers."""
    attention_dropout: float
    """On attention weights."""
    drop_path: float
    """Stochastic depth, rising linearly from 0 over the blocks."""
    decoder: str
    """local: per-patch head over the features of all scales | linear: one linear map a cell of the last stage."""
    decoder_dim: int
    """Width of the local decoder; the same at every embed_dim."""
    maps: int = 0
    """Spatial maps that pre-training reads from the visible voxels of each frame by a ridge regression and draws again:
    the network learns what they and the visible neighbours of a voxel leave. 0: none."""
    maps_of: str = "scan"
    """shared: one set on the common grid, trained, for stores in one template space | scan: each scan's own, from its
    training frames, not trained | null: shared with data.split, else scan."""
    tokens: str = "box"
    """box: every cell of the grid is a token | brain: only those with a brain voxel are computed, attended to and
    merged; not of model=v1."""
    cohort: Optional[str] = None
    """Filled in from the masks of the stores with data.brain=cohort: the cells that are tokens in every clip, as
    `swift.utils.bits` writes them. null: each clip has those of its own scan's brain."""
    attention_base_width: Optional[int] = None
    """muP: embed_dim at which attention scores are divided by sqrt(head_dim) as usual; the divisor then grows like
    head_dim. Follows optimizer.base_width; null: sqrt(head_dim) at every width."""

    @property
    def inner_stages(self) -> int:
        """Stages that run inside the units of task.hidden=drop: two, where the model has one more."""
        return min(2, len(self.depths) - 1)


@dataclass
class TargetConfig:
    """What is to be predicted, and where it is written down."""

    kind: str
    """binary | multiclass | regression | map: a brain map a subject, such as a task's activation."""
    per: str = "subject"
    """subject: one value a person | frame: one value a frame."""
    source: str = "manifest"
    """manifest: a phenotype of the store's manifest (per subject) | events: an events.tsv | confounds: a column of the
    per-frame table that the store keeps of each scan (per frame) | nifti: files of maps (kind=map)."""
    column: Optional[str] = None
    """Of the manifest, events or confounds; null (events): whether any event goes on, classes [no, yes]."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes, as in the column; F|female|0 is class F with other ways to write it. Of a binary task the
    second is the positive one. Per frame from events: a class named `rest` is that of frames without an event."""
    others: str = "refuse"
    """Values of the column that are no class: refuse | leave_out (as n/a and empty ones always are)."""
    response: str = "shift"
    """Events to frames: shift: a frame has the label of delay_seconds before it | hrf: values are convolved with the
    canonical haemodynamic response (regression)."""
    delay_seconds: float = 0.0
    """Haemodynamic delay of response=shift, s."""
    bridge_seconds: float = 0.0
    """Events with a pause of at most so long between them are one, s."""
    events: Optional[str] = None
    """Folder with SCAN_ID_events.tsv (or BIDS names); null: the events that the store has kept."""
    maps: Optional[str] = None
    """Folder with a NIfTI file of each subject and contrast (SUBJECT_..._CONTRAST.nii.gz); null: columns of the
    manifest name the files."""
    contrasts: list[str] = field(default_factory=list)
    """Contrasts of a map, which are predicted together; with maps=null columns of the manifest. Empty: one, `column` or
    the only map that a subject has."""
    retest: Optional[str] = None
    """Folder with a second measurement of the same maps: how far a prediction could come (noise ceiling)."""
    space: Optional[str] = None
    """Space of the maps, such as MNI152NLin6Asym, where neither their names (_space-) nor their headers say it."""


@dataclass
class TaskConfig:
    """What the model is trained to do."""

    name: str
    """pretrain: reconstruct what is hidden; any other name: predict task.target (a YAML file in conf/task)."""
    mask_ratio: float
    """Part of the mask units that is hidden, inside (0, 1)."""
    mask_kind: str
    """random | tube: the same places in every frame | temporal: the last frames | frames: any frames, all places."""
    mask_unit: Optional[list[int]]
    """Voxels x, y, z and frames hidden together, a multiple of the patch; null: the patch, or with task.hidden=drop
    task.mask_kind=tube one token of stage 3 in space."""
    loss: str
    """l1 | smooth_l1 | l2; classes: cross_entropy; maps: l2 | contrastive: reconstructive-contrastive."""
    loss_background: bool
    """Include masked voxels outside the brain."""
    hidden: str = "token"
    """Pre-training: token: a mask token stands in the encoder for a hidden patch | drop: the encoder sees visible units
    (mask_kind=tube) or frames (mask_kind=frames) alone, which costs a third and less."""
    target: Optional[TargetConfig] = None
    """What to predict; null: pre-training."""
    adapt: str = "scratch"
    """How much of the model is trained. scratch: all, without init= | linear: a linear head on the frozen encoder |
    attentive: a head with attention pooling on the frozen encoder | last_block: the head and the last block | lora:
    the head and low-rank changes of the attention | full: all, lower layers slower (layer_decay)."""
    pooling: str = "mean"
    """What the head sees of the last stage (not of adapt=attentive). mean: over the brain's tokens | mean_std: mean and
    standard deviation, so that a linear head sees how strongly a feature varies in the brain. Heads of maps pool over
    time alone, so too by attention: one query."""
    head: str = "pooled"
    """pooled: features of the last stage, pooled over the brain | map_local: each patch of a map by itself, from the
    features of all stages | map_unet: convolutions from the last stage up to the predicted grid."""
    map_step: Optional[int] = 1
    """Voxels along an edge of a predicted cell of a map; null: as many as make about 4 mm."""
    average: str = "predictions"
    """Maps: what is averaged over a subject's clips: predictions | features, before the head makes a map of them."""
    margin_own: list[float] = field(default_factory=lambda: [0.5, 0.0])
    """loss=contrastive: squared error (1: that of the training mean) up to which an own map counts as met, at the first
    and the last step."""
    margin_other: list[float] = field(default_factory=lambda: [0.0, 0.5])
    """loss=contrastive: how much larger the error against another subject's map must be, at the first and last step."""
    courses: bool = False
    """Give the head the courses of model.maps too, read with nothing hidden: of a frame its own, of a clip their mean
    and standard deviation; for brain maps the correlations of all pairs and their standard deviations."""
    layer_decay: float = 0.75
    """adapt=full: factor on the learning rate from one block to the one below it."""
    lora_rank: int = 8
    """adapt=lora: rank of the changes."""
    lora_alpha: float = 16.0
    """adapt=lora: the changes are multiplied by lora_alpha / lora_rank."""
    balance: bool = False
    """Weigh classes in the loss by the inverse of their number among the training clips (or frames)."""
    class_weights: Optional[list[float]] = None
    """Weights of the classes in the loss, in their order, on top of balance; null: 1."""
    select: str = "loss"
    """By which figure of the validation a checkpoint is chosen: loss | auroc | balanced_accuracy (classes) | loss |
    mae | r (regression) | loss | residual_r (maps)."""
    patience: int = 0
    """Validations without improvement after which training stops; 0: never."""
    eval_stride: Optional[int] = None
    """Frames between the starts of validation and test clips; null: they do not overlap."""
    test_fraction: float = 0.5
    """Per-frame tasks without data.split: last part of every scan that is tested."""
    allow_seen: bool = False
    """Test subjects that the weights of init= have seen: go on, and say so."""
    allow_id_leak: bool = False
    """Labels that follow from the names of the subjects: go on, and say so."""


@dataclass
class OptimizerConfig:
    name: str
    """adamw | adamw_mup: AdamW with rates, decay and initial weights scaled with the width (muP)."""
    lr: float
    """Peak learning rate; with muP that of the base width."""
    weight_decay: float
    """On matrices; never on biases, norms, LayerScale, tables and tokens."""
    betas: list[float]
    """Decay of the running means of gradients and of their squares."""
    eps: float
    """Added to the root of the mean square."""
    warmup_steps: int
    """Optimizer steps of the linear warm-up, before the cosine."""
    min_lr_ratio: float
    """Final learning rate of the cosine, as a part of lr."""
    base_width: Optional[int] = None
    """muP: embed_dim of the base model, where adamw_mup is adamw; null for adamw."""
    eps_scaled: bool = False
    """muP: eps falls with the width as gradients do; false in runs frozen before this was a setting."""


@dataclass
class ParallelConfig:
    """How one training is spread over devices. Nothing here changes what is computed, only where and in what order."""

    name: str
    """single | ddp | zero1 | zero2 | zero3 | zero3_offload | fsdp | hsdp."""
    devices: int
    """Ranks on each node; 0: one for every GPU that is seen (one on a CPU), or as many as a launcher has started."""
    nodes: int
    """Nodes of the run."""
    zero_stage: int
    """What DeepSpeed shards: 0 nothing (DeepSpeed is not used) | 1 optimizer | 2 and gradients | 3 and weights."""
    offload_optimizer: bool
    """Keep fp32 weights and moments in host memory and step there (ZeRO 3)."""
    offload_parameters: bool
    """Keep the sharded weights in host memory too (ZeRO 3)."""
    cpu_adam: bool
    """Offload: step with DeepSpeed's vectorized CPU Adam, compiled on first use; false: torch's, slower."""
    activation_checkpointing: str
    """none: keep all activations | selective: recompute what is large and cheap in each block | block: keep only the
    input of each block."""
    compile: Optional[bool]
    """torch.compile each block, one graph of each kind of them; null: on a GPU of NVIDIA's that has what it takes
    (Triton, a C compiler), with strategies with which it was tried, where the settings do not rule it out. A run
    freezes what that came to."""
    reduce_bucket_mb: Optional[float]
    """Gradients are reduced in buckets of this size, MB; null: 100, under ZeRO 1 as large as the largest gradient,
    which would stay whole on every device until the step if no bucket could hold it."""
    gather_bucket_mb: float
    """Weights are gathered in buckets of this size, MB (ZeRO)."""
    overlap: bool
    """Reduce gradients while the backward pass goes on."""
    timeout_minutes: float
    """A rank that waits longer for the others ends the run."""
    group: int = 0
    """hsdp: ranks, in their order, that hold one copy of weights and optimizer among them; 0: those of a node. zero3:
    ranks that hold a second copy of the compute weights between the passes (hpZ); 0: none."""
    fp32_gradients: bool = False
    """zero2, zero3 in bf16: sum gradients over ranks and micro-batches in float32, for twice their bytes; false: in
    bf16, where a small one may vanish beside a large one. ddp, fsdp and hsdp always sum in float32."""
    unit_mb: Optional[float] = None
    """fsdp, hsdp: a block whose gathered weights exceed this, MB, is gathered layer by layer; null: block by block."""


@dataclass
class TrainerConfig:
    max_steps: int
    """Optimizer steps."""
    val_every: int
    """Optimizer steps between validations."""
    val_batches: int
    """Batches a validation at most; 0: all. Tasks with a target always take all."""
    log_every: Optional[int]
    """Optimizer steps between logged points, where the host waits for the device; null: 2 on a CPU, else 50, and in a
    run of fewer than 1,000 steps a twentieth of them."""
    accumulate: int
    """Micro-batches an optimizer step."""
    clip_norm: float
    """Largest global gradient norm; 0: no clipping."""
    precision: str
    """auto | 32 | bf16. auto: bf16 where the device has it in hardware, else 32."""
    accelerator: str
    """auto | gpu: the one that is here | cpu | cuda (NVIDIA, AMD) | xpu (Intel). A job freezes that of its machine."""
    threads: int
    """CPU threads of torch; 0: torch's own choice. Waiting ones soon sleep: with OMP_WAIT_POLICY=active they spin."""
    keep_checkpoints: int
    """The last ones; the best by val/l1 (tasks: task.select) is kept besides."""
    checkpoint_every: int
    """Optimizer steps between checkpoints, besides those at validations and at the end; 0: only those."""
    checkpoint_background: bool
    """Write checkpoints while training goes on (needs host memory for a copy of this rank's states, on
    a GPU page-locked and kept for the next)."""
    figures: bool
    """Draw the loss curve and a reconstruction at the end."""
    wandb: bool
    """Log to Weights & Biases too (needs the extra `wandb`)."""
    phases_every: int = 0
    """Optimizer steps between profiles of three steps, for their time by phase (perf/phase_*); 0: none."""


@dataclass
class GuardConfig:
    """What happens at an optimizer step whose loss or gradient is not finite, or a spike. See docs/guard.md."""

    action: str
    """off | skip: leave that step out | stop: end the run there | rollback: leave it out and put weights and moments
    back to the last good checkpoint. Learning rate and order of the data go on in any case."""
    spike: float
    """How far above the last good steps a loss or gradient norm is a spike: robust standard deviations of its
    logarithm, and at least twice the median; 0: only values that are not finite are bad."""
    window: int
    """Good steps that are looked back on; nothing is called a spike before half as many, nor in the warm-up."""
    patience: int
    """Spikes in a row that are left out; after them the new level is taken for normal."""
    limit: int
    """Bad steps in a row after which the run ends."""
    records: int
    """Records kept in RUN/guard; 0: none."""
    batches: int
    """Of these, records that keep the batch for `python -m swift.replay`, and look for the first bad layer."""
    weights_mb: float
    """Keep the weights of that step with the batch where they are no larger, MB; 0: only name the checkpoint before."""


@dataclass
class TimeBin:
    """How long a job of some number of nodes may run in a partition."""

    partition: str
    """Or quality of service, on machines that have no partitions."""
    min_nodes: int
    max_nodes: int
    time: str
    """Longest time, HH:MM:SS."""


@dataclass
class LauncherConfig:
    """How a run becomes a job of one machine. What each value is for there, and from where: launch/README.md."""

    name: str
    """Of the machine."""
    scheduler: str
    """slurm | pbs (PBS Professional)."""
    site: str
    """launch/sites/NAME.sh is read in the job: modules, network, caches."""
    account: Optional[str]
    """Project that pays; from the environment."""
    needs_account: bool
    nodes: int
    ranks_per_node: int
    """One rank a device."""
    global_batch: Optional[int]
    """Clips of all ranks in an optimizer step, dealt evenly: trainer.accumulate follows from it, with data.batch_size
    or less at a time (strong scaling). null: data.batch_size times trainer.accumulate for each rank."""
    cores_per_rank: int
    time: str
    """HH:MM:SS of one job. A run that takes longer goes on in the next."""
    partition: Optional[str]
    """Slurm: partition. PBS: queue. null: the batch system's own choice."""
    bins: list[TimeBin]
    """All that jobs may be; empty: not checked before the batch system does."""
    qos: Optional[str]
    """Slurm: quality of service."""
    batch_options: list[str]
    """Further options of the job, one a line of its head."""
    step_options: list[str]
    """Further options of srun or mpiexec where it starts the ranks: which cores and devices each gets."""
    node_local: Optional[str]
    """Folder on a disk or in the memory of each node, written in the job's shell; null: nothing is staged."""
    environment: Optional[str]
    """Archive of the Python environment (launch/pack_env.sh) to unpack in node_local; null: the Python that submits."""
    stage_data: bool
    """Copy the shards a node needs to node_local too (data.stage_dir, where that is null)."""
    device: str
    """cpu | cuda (NVIDIA, AMD) | xpu (Intel) | gpu (any): what a rank must find on its node; frozen into the job."""
    machine: Optional[str]
    """conf/sites/NAME.yaml: memory of devices and hosts, which the plan must fit into; null: not checked."""
    min_free_gb: float
    """Free space each node must have in node_local and for the run directory, GB."""
    health: bool
    """Check every node before the run; a bad one is named, and excluded when the job is queued again."""
    monitor_seconds: int
    """Seconds between samples of load and memory of every node; 0: none."""
    save_seconds: int
    """Seconds before the time limit at which the run is told to save and stop; two steps and a save must fit."""
    hang_minutes: float
    """A run without a step for so long is ended and queued again."""
    fruitless_restarts: int
    """Restarts in a row without a new checkpoint after which the run is left alone."""
    array: bool
    """With -m: one job array of all points."""
    pack: int
    """With -m: points that share one job side by side, each on its own nodes; 1: a job a point."""
    dry_run: bool
    """Write the job and show it; submit nothing."""


@dataclass
class Config:
    """The root: what `python -m swift.train` composes."""

    model: ModelConfig
    data: DataConfig
    task: TaskConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    trainer: TrainerConfig
    seed: int
    """Of weights, order of clips, masks and dropout."""
    run_dir: str
    """Folder of this run."""
    init: Optional[str]
    """Run or checkpoint whose weights to start from."""
    resume: Optional[str]
    """Run to go on with, exactly where it stopped."""
    launcher: Optional[LauncherConfig] = None
    """Set by +launcher=...: submit instead of running here."""
    guard: GuardConfig = field(default_factory=lambda: GuardConfig("off", 0.0, 4, 0, 1, 0, 0, 0.0))
    """Runs from before there was one had none."""

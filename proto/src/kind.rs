//! What the kinds of envelopes are called. A number is never reused.

/// Node to control: I am here.
pub const JOIN: u32 = 1;
/// Leader to members: the view has changed. Also the answer to [`VIEW_WANTED`].
pub const VIEW: u32 = 2;
/// Member to leader: send me the whole view.
pub const VIEW_WANTED: u32 = 3;
/// Leader to node: you own this shard.
pub const GRANT: u32 = 4;
/// Node to leader: I gave this shard up (payload: Held, with the epoch that I had).
pub const DROPPED: u32 = 5;
/// Node to leader: this shard is open now (payload: Held). Beats say it, too, a little later.
pub const HELD: u32 = 8;
/// Node to control: the body of a definition.
pub const DEFINITION: u32 = 6;
/// Node to leader: I am leaving (payload: JoinRequest).
pub const LEAVE: u32 = 7;

/// Control replica to leader: I stand by (payload: StandbyRequest; the answer is a JoinResponse).
pub const STANDBY: u32 = 9;
/// Leader to control replica: how many nodes do you hear (the answer is a SightAnswer).
pub const SIGHT: u32 = 10;
/// Leader to control replica: I step back, lead now.
pub const TAKE_OVER: u32 = 11;
/// Node to leader: I am about to leave, give my shards to others (payload: JoinRequest).
pub const DRAIN: u32 = 12;
/// Leader to node: an operator wants you to drain and end.
pub const DRAIN_WANTED: u32 = 13;
/// Node to leader: an agent failed (payload: AgentFailed).
pub const AGENT_FAILED: u32 = 14;

/// API server to owner.
pub const SUBMIT: u32 = 20;
pub const GET: u32 = 21;
pub const CANCEL: u32 = 22;
pub const LIST: u32 = 23;
pub const AGENTS: u32 = 24;
pub const HISTORY: u32 = 25;
pub const SUBSCRIBE: u32 = 26;
pub const UNSUBSCRIBE: u32 = 27;
pub const SIGNAL: u32 = 29;
/// Owner to API server: events of a subscription.
pub const EVENTS: u32 = 28;

/// Owner to a node whose pools offer a step.
pub const STEP: u32 = 40;
/// New owner of a shard to every node: which of its steps do you run, or hold answers of?
pub const STEPS_WANTED: u32 = 41;
/// Node to the new owner: the answer of a step that an owner before it had asked for.
pub const STEP_ANSWERED: u32 = 42;
/// Owner to a node: these answers are in the journal.
pub const STEPS_KEPT: u32 = 43;
/// Worker to owner: what the model of a step says while it runs (payload: StepText; the answer is a StepTextAnswer).
pub const STEP_TEXT: u32 = 44;

/// What an API server that does not lead asks the leader for a client. The payload is a LeaderCall, whose payload is the
/// request of the API, and the answer is that of the API; for APPLY both are a PutDefinition.
pub const ASK_NODES: u32 = 60;
pub const ASK_SHARDS: u32 = 61;
pub const ASK_FIND: u32 = 62;
pub const ASK_PLACEMENT: u32 = 63;
pub const ASK_APPLY: u32 = 64;
pub const ASK_CORDON: u32 = 65;
pub const ASK_UNCORDON: u32 = 66;
pub const ASK_DRAIN: u32 = 67;
pub const ASK_RELEASE: u32 = 68;

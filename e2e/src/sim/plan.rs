//! What a seed stands for: the shape of a small cluster, what its clients do, and what goes wrong, as a list of steps
//! in virtual time. Steps can be taken out one by one, which is how a failing run is made short (`shrink`).

use super::event::Host;
use lamina_protocol::management::Step as LeaderStep;
use std::fmt;

mod directed;
mod make;
mod moment;

pub use directed::starts::{Start, starts};
pub use moment::Moment;

/// The cluster and the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Storage servers.
    pub servers: usize,
    /// Devices of each.
    pub disks: usize,
    /// Hosts that can attach the volume.
    pub clients: usize,
    /// Operators, of which one leads.
    pub operators: usize,
    /// Copies of each group.
    pub copies: u8,
    /// Groups of the stripe.
    pub groups: u8,
    /// Blocks of the volume.
    pub blocks: u64,
    /// Blocks that it may grow to.
    pub most_blocks: u64,
    /// Bytes of a page; the chunk is 64 KiB.
    pub page_bytes: u32,
    /// Bytes of a device.
    pub capacity_bytes: u64,
    /// Several sessions at once.
    pub multi_session: bool,
    /// When a member that is away is replaced, milliseconds.
    pub rebuild_after_ms: u64,
    /// One way over the network, microseconds.
    pub network_us: u64,
    /// What a late message takes longer, at most, microseconds.
    pub jitter_us: u64,
    /// How far a host's clock may be off, parts per million (drift bound: 10 % between two).
    pub drift_ppm: u64,
    /// How long a leader that lost its lease may go on without seeing it, milliseconds.
    pub stubborn_ms: u64,
    /// Bytes that a driver keeps for a loss.
    pub kept_bytes: u64,
    /// One frame in so many breaks its connection; 0 = none does.
    pub flaky: u64,
    /// A person forces a copy that is behind when a group has waited for so long, milliseconds; 0 = never.
    pub force_after_ms: u64,
    /// When the faults end and all is healed, microseconds.
    pub heal_at_us: u64,
}

/// What the application asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Read so many blocks from this one on.
    Read(u64, u64),
    /// Write them.
    Write(u64, u64),
    /// Discard them.
    Discard(u64, u64),
    /// Flush.
    Flush,
    /// Whether any block was ever written: what a node asks before it makes a filesystem.
    Blank,
}

/// Which operation of a disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    /// The next write.
    Write,
    /// The next commit.
    Commit,
    /// The next flush.
    Flush,
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Storage servers stop at once, by kill -9 or by a power cut, and start again.
    StopServers {
        /// Which.
        servers: Vec<usize>,
        /// Unflushed writes are lost too.
        power: bool,
        /// How long they stay away, milliseconds.
        down_ms: u64,
    },
    /// kill -9 of a driver; its successor takes the device over.
    KillDriver {
        /// Where.
        client: usize,
        /// Until the successor starts, milliseconds.
        down_ms: u64,
    },
    /// A successor starts while the old process lives.
    TakeOver {
        /// Where.
        client: usize,
    },
    /// A client's host loses power; what was attached there must be attached anew.
    PowerOffClient {
        /// Which.
        client: usize,
        /// Milliseconds.
        down_ms: u64,
    },
    /// kill -9 of an operator.
    KillOperator {
        /// Which.
        operator: usize,
        /// Milliseconds.
        down_ms: u64,
    },
    /// kill -9 of whoever leads when it next passes this step.
    KillLeaderAt {
        /// The step.
        step: LeaderStep,
        /// Milliseconds.
        down_ms: u64,
    },
    /// Something else goes wrong when this comes for the so manieth time, or a little later.
    When {
        /// What is waited for.
        moment: Moment,
        /// How often.
        times: u32,
        /// Microseconds after it.
        later_us: u64,
        /// What.
        fault: Box<Fault>,
    },
    /// Two things at once.
    Both {
        /// One.
        one: Box<Fault>,
        /// The other.
        other: Box<Fault>,
    },
    /// The lease is taken from whoever holds it.
    LoseLease,
    /// An old copy is put in place of what the API server keeps.
    RestoreApi {
        /// From how long ago, milliseconds.
        back_ms: u64,
        /// Resource versions go back, too.
        versions: bool,
    },
    /// A person wants a server to be empty for a time.
    Drain {
        /// Which.
        server: usize,
        /// Milliseconds.
        ms: u64,
    },
    /// A process stands still (SIGSTOP), then goes on where it was.
    Freeze {
        /// Where.
        host: Host,
        /// Milliseconds.
        ms: u64,
    },
    /// Nothing gets through from the first to the second, or in both directions.
    Cut {
        /// From these.
        from: Vec<Host>,
        /// To these.
        to: Vec<Host>,
        /// And back.
        both: bool,
        /// Milliseconds.
        ms: u64,
    },
    /// Connections break.
    Break {
        /// Decides which.
        pick: u64,
    },
    /// A device fails at the next operation of a kind.
    FailDisk {
        /// Of this server.
        server: usize,
        /// Which.
        disk: usize,
        /// At what.
        how: DiskFault,
    },
    /// A block rots.
    Rot {
        /// Of this server.
        server: usize,
        /// Which.
        disk: usize,
        /// Decides which block.
        pick: u64,
    },
    /// The server comes back with a blank disk in place of a used one.
    BlankDisk {
        /// Of this server.
        server: usize,
        /// Which.
        disk: usize,
        /// Milliseconds.
        down_ms: u64,
    },
    /// A disk that was replaced is put into its server again, beside the others.
    OldDisk {
        /// Of this server.
        server: usize,
        /// Milliseconds.
        down_ms: u64,
    },
    /// A disk is slow.
    SlowDisk {
        /// Of this server.
        server: usize,
        /// What every operation takes longer, microseconds.
        extra_us: u64,
        /// Milliseconds.
        ms: u64,
    },
    /// Every call to the API server takes longer, each way.
    SlowApi {
        /// By so much at most, microseconds.
        extra_us: u64,
        /// Milliseconds.
        ms: u64,
    },
    /// A server is asked to stop (SIGTERM), is killed some time later, and comes back.
    Leave {
        /// Which.
        server: usize,
        /// Milliseconds.
        down_ms: u64,
    },
}

/// One thing that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The application of a client asks.
    Ask {
        /// Where.
        client: usize,
        /// What.
        ask: Ask,
    },
    /// The volume is to be used here; on a volume for one session: no longer where it was.
    Attach {
        /// Where.
        client: usize,
        /// The session before is ended in order: everything answered and flushed.
        clean: bool,
    },
    /// The volume is no longer used here.
    Detach {
        /// Where.
        client: usize,
    },
    /// The volume is to be larger.
    Grow {
        /// So many blocks.
        blocks: u64,
    },
    /// The volume is to be deleted, whoever uses it.
    Delete,
    /// Something goes wrong.
    Fault(Fault),
}

/// When what is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Microseconds.
    pub at_us: u64,
    /// What.
    pub action: Action,
}

/// One whole run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Decides everything that the steps do not.
    pub seed: u64,
    /// The cluster.
    pub setup: Setup,
    /// What is done, in order.
    pub steps: Vec<Step>,
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blank => write!(f, "asks whether all is blank"),
            Self::Read(block, count) => write!(f, "reads {count} blocks at {block}"),
            Self::Write(block, count) => write!(f, "writes {count} blocks at {block}"),
            Self::Discard(block, count) => write!(f, "discards {count} blocks at {block}"),
            Self::Flush => write!(f, "flushes"),
        }
    }
}

fn names(hosts: &[Host]) -> String {
    hosts.iter().map(Host::to_string).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StopServers { servers, power, down_ms } => {
                let how = if *power { "power cut at" } else { "kill -9 of" };
                write!(f, "{how} servers {servers:?}, back after {down_ms} ms")
            }
            Self::KillDriver { client, down_ms } => {
                write!(f, "kill -9 of the driver of client {client}, successor after {down_ms} ms")
            }
            Self::TakeOver { client } => write!(f, "a successor of the driver of client {client} starts beside it"),
            Self::PowerOffClient { client, down_ms } => write!(f, "client {client} loses power for {down_ms} ms"),
            Self::KillOperator { operator, down_ms } => {
                write!(f, "kill -9 of operator {operator}, back after {down_ms} ms")
            }
            Self::KillLeaderAt { step, down_ms } => {
                write!(f, "kill -9 of the leader when it passes {step:?}, back after {down_ms} ms")
            }
            Self::When { moment, times, later_us, fault } => {
                write!(f, "{later_us} us after {moment} for the {times}. time: {fault}")
            }
            Self::Both { one, other } => write!(f, "{one}; {other}"),
            Self::LoseLease => write!(f, "the lease is taken from its holder"),
            Self::RestoreApi { back_ms, versions } => {
                let which = if *versions { "with its resource versions" } else { "under new resource versions" };
                write!(f, "the API server is as it was {back_ms} ms ago, {which}")
            }
            Self::Drain { server, ms } => write!(f, "server {server} is to be empty for {ms} ms"),
            Self::Freeze { host, ms } => write!(f, "{host} stands still for {ms} ms"),
            Self::Cut { from, to, both, ms } => {
                let way = if *both { "<->" } else { "->" };
                write!(f, "cut {} {way} {} for {ms} ms", names(from), names(to))
            }
            Self::Break { .. } => write!(f, "connections break"),
            Self::FailDisk { server, disk, how } => {
                write!(f, "disk {disk} of server {server} fails at the next {how:?}")
            }
            Self::Rot { server, disk, .. } => write!(f, "a block on disk {disk} of server {server} rots"),
            Self::BlankDisk { server, disk, down_ms } => {
                write!(f, "server {server} stops and comes back with a blank disk {disk} after {down_ms} ms")
            }
            Self::OldDisk { server, down_ms } => {
                write!(
                    f,
                    "server {server} stops and has a disk that was replaced again, beside the others, after {down_ms} ms"
                )
            }
            Self::SlowDisk { server, extra_us, ms } => {
                write!(f, "disks of server {server} take {extra_us} us longer for {ms} ms")
            }
            Self::SlowApi { extra_us, ms } => {
                write!(f, "calls to the API server take {extra_us} us longer for {ms} ms")
            }
            Self::Leave { server, down_ms } => {
                write!(f, "server {server} asks to leave, is killed, back after {down_ms} ms")
            }
        }
    }
}

impl Fault {
    /// Its name among the counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::StopServers { power: true, .. } => "power cut of servers",
            Self::StopServers { power: false, .. } => "kill of servers",
            Self::KillDriver { .. } => "kill of a driver",
            Self::TakeOver { .. } => "take-over of a living driver",
            Self::PowerOffClient { .. } => "power cut of a client",
            Self::KillOperator { .. } => "kill of an operator",
            Self::KillLeaderAt { .. } => "kill of the leader at a step",
            Self::When { .. } => "trouble timed by a moment",
            Self::Both { .. } => "two at once",
            Self::LoseLease => "lease taken away",
            Self::RestoreApi { versions: true, .. } => "an older API server, versions too",
            Self::RestoreApi { versions: false, .. } => "an older API server",
            Self::Drain { .. } => "drain of a server",
            Self::Freeze { host: Host::Server(_), .. } => "standstill of a server",
            Self::Freeze { host: Host::Driver(_), .. } => "standstill of a driver",
            Self::Freeze { .. } => "standstill of an operator",
            Self::Cut { both: true, .. } => "partition",
            Self::Cut { both: false, .. } => "one-way cut",
            Self::Break { .. } => "broken connections",
            Self::FailDisk { how: DiskFault::Write, .. } => "failed write of a disk",
            Self::FailDisk { how: DiskFault::Commit, .. } => "failed commit of a disk",
            Self::FailDisk { how: DiskFault::Flush, .. } => "failed flush of a disk",
            Self::Rot { .. } => "rotted block",
            Self::BlankDisk { .. } => "blank disk",
            Self::OldDisk { .. } => "old disk put back",
            Self::SlowDisk { .. } => "slow disk",
            Self::SlowApi { .. } => "slow API server",
            Self::Leave { .. } => "server asked to stop",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ask { client, ask } => write!(f, "client {client} {ask}"),
            Self::Attach { client, clean: true } => write!(f, "the volume is attached to client {client}, in order"),
            Self::Attach { client, clean: false } => write!(f, "the volume is attached to client {client}, by force"),
            Self::Detach { client } => write!(f, "the volume is detached from client {client}"),
            Self::Grow { blocks } => write!(f, "the volume is to have {blocks} blocks"),
            Self::Delete => write!(f, "the volume is to be deleted"),
            Self::Fault(fault) => write!(f, "FAULT {fault}"),
        }
    }
}

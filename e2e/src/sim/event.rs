//! Who takes part in a simulated world and what can happen to them.

use super::net::ConnIndex;
use super::plan::Fault;
use lamina_protocol::control::{ControlRequest, DriverReport};
use lamina_protocol::ids::{BootId, ServerId};
use lamina_protocol::management::{self, CallId, Guard, Status, VolumeObject};
use lamina_protocol::storage_server::medium::OpId;
use std::fmt;
use std::rc::Rc;

/// A machine of the simulated world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// Runs a storage server.
    Server(usize),
    /// Runs a driver, if something is attached.
    Driver(usize),
    /// Runs an operator.
    Operator(usize),
    /// The API server.
    Api,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(n) => write!(f, "server {n}"),
            Self::Driver(n) => write!(f, "client {n}"),
            Self::Operator(n) => write!(f, "operator {n}"),
            Self::Api => write!(f, "the API server"),
        }
    }
}

/// A process: a host, and which of its processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) host: Host,
    pub(super) epoch: u32,
}

/// What an operator asks of the API server.
#[derive(Clone, Debug)]
pub(super) enum StoreCall {
    Write { call: CallId, guard: Guard, next: Box<Status> },
    Release { call: CallId, guard: Guard },
    Read,
    Lease,
    RaiseLease { above: u64 },
}

/// What the API server answers.
#[derive(Clone, Debug)]
pub(super) enum StoreAnswer {
    Leader(Box<management::Input>),
    /// Whether it holds the lease now, and the number.
    Lease {
        holds: bool,
        number: u64,
        /// `None` = it is deleted.
        object: Option<Rc<VolumeObject>>,
    },
    LeaseUnknown,
}

/// Something that happens.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// A step of the plan.
    Step(usize),
    /// Trouble that waited for a moment.
    Timed(Box<Fault>),
    /// The end of a fault, by its number.
    Heal(usize),
    Wake {
        process: Process,
        serial: u64,
    },
    Dial {
        process: Process,
        to: ServerId,
    },
    Dialed {
        conn: ConnIndex,
    },
    DialTimedOut {
        conn: ConnIndex,
    },
    Stream {
        conn: ConnIndex,
        from: usize,
    },
    HeldTooLong {
        conn: ConnIndex,
        from: usize,
        serial: u64,
    },
    Gone {
        conn: ConnIndex,
        end: usize,
    },
    Disk {
        process: Process,
        disk: usize,
        boot: BootId,
        op: OpId,
    },
    OpenDisk {
        process: Process,
        disk: usize,
    },
    /// A request of an application reaches a driver.
    Submit {
        process: Process,
        tag: u64,
    },
    Boot {
        host: Host,
        epoch: u32,
    },
    Thaw {
        host: Host,
        number: usize,
    },
    StoreArrive {
        process: Process,
        call: StoreCall,
    },
    StoreAnswer {
        process: Process,
        answer: StoreAnswer,
    },
    LeaseTick {
        process: Process,
    },
    /// A command that a server has heard before.
    CallAgain {
        process: Process,
        request: Box<ControlRequest>,
    },
    Watch {
        process: Process,
        object: Rc<VolumeObject>,
    },
    ClientWatch {
        host: usize,
        object: Rc<VolumeObject>,
    },
    Report {
        operator: usize,
        report: Box<DriverReport>,
    },
    /// A look at the whole world.
    Look,
    /// The kubelet of a client's host looks whether there is something to do.
    Kubelet {
        host: usize,
    },
}

impl Event {
    /// The process that must run for this to happen now; frozen ones take it later.
    pub(super) fn process(&self, conn_end: impl Fn(ConnIndex, usize) -> Process) -> Option<Process> {
        match self {
            Self::Wake { process, .. }
            | Self::Dial { process, .. }
            | Self::Disk { process, .. }
            | Self::OpenDisk { process, .. }
            | Self::Submit { process, .. }
            | Self::StoreAnswer { process, .. }
            | Self::LeaseTick { process }
            | Self::CallAgain { process, .. }
            | Self::Watch { process, .. } => Some(*process),
            Self::Stream { conn, from } => Some(conn_end(*conn, 1 - *from)),
            Self::Gone { conn, end } => Some(conn_end(*conn, *end)),
            _ => None,
        }
    }
}

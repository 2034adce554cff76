//! What the operator's core runs over: objects with compare-and-swap (PROTOCOL.md §3, H18).
//!
//! A [`Store`] takes writes, and hands every object in as a [`Change`], first all that exist, then `Listed`, then what
//! changes. Invariant of every implementation: [`Store::write`] compares generation, proposal and retired copies and
//! replaces the status in one atomic and durable step. What is written for people ([`VolumeDescription`],
//! [`ServerDescription`], [`Notice`]) decides nothing and may get lost.

use lamina_control_api::storage::ServerIdentity;
use lamina_crds::storage_server::DeviceState;
use lamina_crds::translate::Unreadable;
use lamina_protocol::ids::{ServerId, VolumeId};
use lamina_protocol::management::{Guard, Policy, ServerObject, Status, VolumeObject, Written};

use crate::summary::{PolicyDescription, ServerDescription, VolumeDescription};

/// An object as the store has it.
#[derive(Clone, Debug)]
pub enum Change {
    /// Everything that exists was handed in.
    Listed,
    /// A volume is new or changed.
    Volume(Box<VolumeObject>),
    /// A volume is gone.
    VolumeGone(VolumeId),
    /// A server is new or changed.
    Server(KnownServer),
    /// The object of that name is gone.
    ServerGone(String),
    /// A policy is new or changed, or the number of volumes that use it; `None` = it cannot be read.
    Policy {
        /// Its name.
        name: String,
        /// It.
        policy: Option<Policy>,
        /// Volumes that use it.
        volumes: u64,
    },
    /// The policy of that name is gone.
    PolicyGone(String),
    /// The Lease's number as read or written (R6).
    LeaseNumber(u64),
}

/// A `StorageServer` object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownServer {
    /// Name of the object.
    pub name: String,
    /// `host:port` of its control service, tried in order.
    pub control: Vec<String>,
    /// Its devices as it says itself; empty without Kubernetes.
    pub devices: Vec<KnownDevice>,
    /// What the core knows of it; its id is none as long as it has no device.
    pub object: ServerObject,
}

/// A device of a server, as the server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownDevice {
    /// Its path.
    pub path: String,
    /// Whether it serves.
    pub state: DeviceState,
    /// Why it is so; empty = it need not be said.
    pub reason: String,
}

impl KnownServer {
    /// Its id; none while it has no device.
    pub fn id(&self) -> ServerId {
        self.object.id
    }
}

/// Something happened, with the names of what it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Name of the volume.
    pub volume: Option<String>,
    /// Name of the server.
    pub server: Option<String>,
    /// In CamelCase.
    pub reason: String,
    /// In plain words.
    pub text: String,
    /// Whether somebody should look.
    pub warning: bool,
}

/// Why a store did not do what it was asked for. The runtime tries again, later.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// What.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not an object.
    #[error("{} is not an object: {source}", path.display())]
    Yaml {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        source: serde_yaml::Error,
    },
    /// An object is not one that the protocol knows; it is left alone.
    #[error("{name} is left alone: {why}")]
    Unreadable {
        /// Which.
        name: String,
        /// Why.
        why: Unreadable,
    },
    /// The API server refused or did not answer.
    #[error("the API server: {0}")]
    Api(#[from] Box<kube::Error>),
    /// There is no such object any more.
    #[error("there is no such object")]
    Gone,
}

impl From<kube::Error> for StoreError {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

/// Objects with compare-and-swap.
#[tonic::async_trait]
pub trait Store: Send + Sync + 'static {
    /// Replaces the status of a volume if the guard holds.
    async fn write(&self, volume: VolumeId, guard: &Guard, next: &Status) -> Written;
    /// Takes the finalizer away if the guard holds.
    async fn release(&self, volume: VolumeId, guard: &Guard) -> Written;
    /// The object as it is now, past every cache; `None` = it is gone.
    async fn read(&self, volume: VolumeId) -> Result<Option<VolumeObject>, StoreError>;
    /// Raises the Lease's number above this (R6); told by [`Change::LeaseNumber`].
    async fn raise_lease_number(&self, above: u64);
    /// Writes what people see of a volume.
    async fn describe_volume(&self, volume: VolumeId, description: &VolumeDescription) -> Result<(), StoreError>;
    /// Writes what people see of a server.
    async fn describe_server(&self, name: &str, description: &ServerDescription) -> Result<(), StoreError>;
    /// Writes what people see of a policy.
    async fn describe_policy(&self, name: &str, description: &PolicyDescription) -> Result<(), StoreError>;
    /// Tells people.
    async fn tell(&self, notice: &Notice) -> Result<(), StoreError>;
    /// Whether servers without a known id are to be dialled, because nobody else notes it.
    fn meets_servers(&self) -> bool;
    /// A server answered a `hello`; notes who it is if [`Store::meets_servers`].
    async fn server_met(&self, name: &str, identity: &ServerIdentity) -> Result<(), StoreError>;
}

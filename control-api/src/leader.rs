//! What drivers ask of the leader: [`LeaderClient`] for them, [`Service`] over a [`Leader`] for the operator.
//!
//! Invariant: whoever watches a volume sees its last committed map sooner or later; maps in between may be left out, so a
//! slow watcher costs one map of memory.

use crate::edge::{Malformed, id_bytes, id_from, value_from};
use crate::{MAX_LEADER_MESSAGE_BYTES, v1};
use futures::Stream;
use lamina_protocol::codec::encode;
use lamina_protocol::control::DriverReport;
use lamina_protocol::ids::{Generation, SessionId, VolumeId};
use lamina_protocol::map::VolumeMap;
use std::pin::Pin;
use std::time::Duration;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use v1::leader_service_client::LeaderServiceClient;
use v1::leader_service_server::{LeaderService, LeaderServiceServer};

/// Metadata key with the leader's `host:port`, of an answer that is UNAVAILABLE because another replica leads.
pub const LEADER_KEY: &str = "lamina-leader";
/// How long a connection may take to be made.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a caller waits until a session is replaced: a settle may lie between.
const REPLACE_PATIENCE: Duration = Duration::from_secs(45);

/// What the operator answers with.
pub trait Leader: Send + Sync + 'static {
    /// Takes a driver's report; must not wait.
    fn report(&self, report: DriverReport) -> Result<(), Refusal>;
    /// The committed maps of a volume; `None` in it = no map yet.
    fn maps(&self, volume: VolumeId) -> Result<watch::Receiver<Option<VolumeMap>>, Refusal>;
    /// Replaces the session of a node's attachment by a new one; answers when that is admitted (PROTOCOL.md R10).
    fn replace_session(&self, asked: Replace) -> impl Future<Output = Result<Replaced, Refusal>> + Send;
}

/// A node cannot use the session of its attachment again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replace {
    /// Of which volume.
    pub volume: VolumeId,
    /// The session that it has.
    pub session: SessionId,
    /// Name of the node.
    pub node: String,
}

/// What took a session's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// It.
    pub session: SessionId,
    /// Of a committed map that admits it.
    pub generation: Generation,
}

/// Why the operator does not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another replica leads, at this `host:port` if it is known. Ask there.
    #[error("another replica leads")]
    NotLeader {
        /// Where it is.
        leader: Option<String>,
    },
    /// There is no such volume.
    #[error("there is no such volume")]
    NoVolume,
    /// Too many reports wait. Say it again later.
    #[error("too many reports wait")]
    Busy,
    /// The node holds no attachment with that session, now or before.
    #[error("the volume is not attached to node {node} with that session: it must be attached anew")]
    NotAttached {
        /// The node that asked.
        node: String,
    },
    /// Nobody is admitted to it any more.
    #[error("the volume is being deleted")]
    BeingDeleted,
    /// The wish stands, and the new session is not admitted yet. Ask again.
    #[error("the session is being replaced: {waits_for}")]
    NotYet {
        /// In plain words.
        waits_for: String,
    },
    /// The volume's object could not be read or changed. Ask again.
    #[error("the volume's object could not be changed: {why}")]
    Object {
        /// As its store says.
        why: String,
    },
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match &refusal {
            Refusal::NotLeader { .. } => Code::Unavailable,
            Refusal::NoVolume => Code::NotFound,
            Refusal::Busy => Code::ResourceExhausted,
            Refusal::NotAttached { .. } | Refusal::BeingDeleted => Code::FailedPrecondition,
            Refusal::NotYet { .. } | Refusal::Object { .. } => Code::Unavailable,
        };
        let mut status = Self::new(code, refusal.to_string());
        if let Refusal::NotLeader { leader: Some(leader) } = &refusal
            && let Ok(address) = leader.parse()
        {
            status.metadata_mut().insert(LEADER_KEY, address);
        }
        status
    }
}

/// The gRPC service over a [`Leader`].
#[derive(Debug)]
pub struct Service<L>(L);

impl<L: Leader> Service<L> {
    /// The service.
    pub fn new(leader: L) -> LeaderServiceServer<Self> {
        LeaderServiceServer::new(Self(leader)).max_decoding_message_size(MAX_LEADER_MESSAGE_BYTES)
    }
}

type Maps = Pin<Box<dyn Stream<Item = Result<v1::CommittedMap, Status>> + Send>>;

#[tonic::async_trait]
impl<L: Leader> LeaderService for Service<L> {
    type WatchMapStream = Maps;

    async fn report(&self, request: Request<v1::ReportRequest>) -> Result<Response<v1::ReportReply>, Status> {
        self.0.report(value_from("report", &request.into_inner().report)?)?;
        Ok(Response::new(v1::ReportReply {}))
    }

    async fn replace_session(
        &self,
        request: Request<v1::ReplaceSessionRequest>,
    ) -> Result<Response<v1::ReplaceSessionReply>, Status> {
        let v1::ReplaceSessionRequest { volume, session, node } = request.into_inner();
        let volume = VolumeId(id_from("volume", &volume)?);
        let session = SessionId(id_from("session", &session)?);
        let Replaced { session, generation } = self.0.replace_session(Replace { volume, session, node }).await?;
        Ok(Response::new(v1::ReplaceSessionReply { session: id_bytes(session.0), generation: generation.0 }))
    }

    async fn watch_map(&self, request: Request<v1::WatchMapRequest>) -> Result<Response<Maps>, Status> {
        let volume = VolumeId(id_from("volume", &request.into_inner().volume)?);
        let mut maps = self.0.maps(volume)?;
        maps.mark_changed();
        let stream = futures::stream::unfold(maps, |mut maps| async move {
            loop {
                maps.changed().await.ok()?;
                let bytes = maps.borrow_and_update().as_ref().map(encode);
                if let Some(map) = bytes {
                    return Some((Ok(v1::CommittedMap { map }), maps));
                }
            }
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

/// Why the leader did not answer. The caller tries again, at `leader` if it is named.
#[derive(Debug, thiserror::Error)]
pub enum LeaderError {
    /// The address does not parse, or nobody is there.
    #[error("cannot connect: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// It answered, but not what was asked for.
    #[error("the leader answered: {}", .0.message())]
    Answered(Box<Status>),
    /// What came does not decode.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl LeaderError {
    /// Where the leader is, if the answer said so.
    pub fn leader(&self) -> Option<&str> {
        match self {
            Self::Answered(status) => status.metadata().get(LEADER_KEY)?.to_str().ok(),
            _ => None,
        }
    }

    /// Whether asking again is of no use: the node holds no such attachment, or the volume is going.
    pub fn is_final(&self) -> bool {
        let last = |status: &Status| matches!(status.code(), Code::FailedPrecondition | Code::NotFound);
        matches!(self, Self::Answered(status) if last(status))
    }

    /// Whether there is no such volume.
    pub fn no_volume(&self) -> bool {
        matches!(self, Self::Answered(status) if status.code() == Code::NotFound)
    }
}

impl From<Status> for LeaderError {
    fn from(status: Status) -> Self {
        Self::Answered(Box::new(status))
    }
}

/// Talks to the leader; may be cloned.
#[derive(Clone, Debug)]
pub struct LeaderClient(LeaderServiceClient<Channel>);

impl LeaderClient {
    /// Dials `host:port`.
    pub async fn connect(address: &str) -> Result<Self, LeaderError> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(PATIENCE)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(PATIENCE)
            .keep_alive_while_idle(true);
        Ok(Self::over(endpoint.connect().await?))
    }

    /// Over a channel that the caller made.
    pub fn over(channel: Channel) -> Self {
        Self(LeaderServiceClient::new(channel).max_decoding_message_size(MAX_LEADER_MESSAGE_BYTES))
    }

    /// Says that a member is in trouble.
    pub async fn report(&mut self, report: &DriverReport) -> Result<(), LeaderError> {
        let mut request = Request::new(v1::ReportRequest { report: encode(report) });
        request.set_timeout(PATIENCE);
        self.0.report(request).await?;
        Ok(())
    }

    /// Has the session of a node's attachment replaced.
    ///
    /// # Errors
    /// [`LeaderError::is_final`]: it must be attached anew. Else ask again: the answer will be the same session.
    pub async fn replace_session(&mut self, asked: &Replace) -> Result<Replaced, LeaderError> {
        let Replace { volume, session, node } = asked;
        let (volume, session) = (id_bytes(volume.0), id_bytes(session.0));
        let mut request = Request::new(v1::ReplaceSessionRequest { volume, session, node: node.clone() });
        request.set_timeout(REPLACE_PATIENCE);
        let v1::ReplaceSessionReply { session, generation } = self.0.replace_session(request).await?.into_inner();
        Ok(Replaced { session: SessionId(id_from("session", &session)?), generation: Generation(generation) })
    }

    /// The committed maps of a volume, from the present one on.
    pub async fn watch(&mut self, volume: VolumeId) -> Result<WatchedMaps, LeaderError> {
        let request = v1::WatchMapRequest { volume: id_bytes(volume.0) };
        Ok(WatchedMaps(self.0.watch_map(request).await?.into_inner()))
    }
}

/// Maps of one volume as they are committed.
#[derive(Debug)]
pub struct WatchedMaps(Streaming<v1::CommittedMap>);

impl WatchedMaps {
    /// The next map; `None` when the leader is gone.
    pub async fn next(&mut self) -> Option<Result<VolumeMap, LeaderError>> {
        match self.0.message().await {
            Ok(message) => message.map(|committed| Ok(value_from("map", &committed.map)?)),
            Err(status) => Some(Err(status.into())),
        }
    }
}

#[cfg(test)]
mod tests;

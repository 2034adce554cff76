//! What drivers ask of the leader: [`LeaderClient`] for them, [`Service`] over a [`Leader`] for the operator.
//!
//! Invariant: whoever watches a volume sees its last committed map sooner or later; maps in between may be left out, so a
//! slow watcher costs one map of memory.

use crate::edge::{Malformed, id_bytes, id_from, value_from};
use crate::{MAX_LEADER_MESSAGE_BYTES, v1};
use futures::Stream;
use lamina_protocol::codec::encode;
use lamina_protocol::control::DriverReport;
use lamina_protocol::ids::VolumeId;
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

/// What the operator answers with.
pub trait Leader: Send + Sync + 'static {
    /// Takes a driver's report; must not wait.
    fn report(&self, report: DriverReport) -> Result<(), Refusal>;
    /// The committed maps of a volume; `None` in it = no map yet.
    fn maps(&self, volume: VolumeId) -> Result<watch::Receiver<Option<VolumeMap>>, Refusal>;
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
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match &refusal {
            Refusal::NotLeader { .. } => Code::Unavailable,
            Refusal::NoVolume => Code::NotFound,
            Refusal::Busy => Code::ResourceExhausted,
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

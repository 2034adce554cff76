//! The leader of the operator: where it is, and what drivers tell it.
//!
//! A report is a hint that the driver repeats as long as it is true, so one that does not get through is dropped and
//! nothing queues. Steady I/O makes no reports and so sends nothing.

use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client, ResourceExt};
use lamina_control_api::leader::{LeaderClient, LeaderError, Replace, Replaced};
use lamina_protocol::control::DriverReport;
use lamina_protocol::ids::VolumeId;
use lamina_protocol::map::VolumeMap;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// The operator's Lease.
const LEASE: &str = "lamina-operator";
/// Its annotation with the leader's `host:port`.
const ADDRESS: &str = "lamina.dev/leader-address";
/// Between two attempts where no event tells that another one is worth it.
const AGAIN: Duration = Duration::from_secs(1);
/// Reports that may wait for the leader.
pub const MAX_REPORTS: usize = 64;

/// Where the leader is found.
#[derive(Clone)]
pub enum Whereabouts {
    /// As the Lease of this namespace says.
    Lease(Box<Api<Lease>>),
    /// There.
    Fixed(String),
}

impl Whereabouts {
    /// By the Lease in this namespace.
    pub fn lease(client: Client, namespace: &str) -> Self {
        Self::Lease(Box::new(Api::namespaced(client, namespace)))
    }

    async fn address(&self) -> Option<String> {
        match self {
            Self::Fixed(address) => Some(address.clone()),
            Self::Lease(leases) => match leases.get_opt(LEASE).await {
                Ok(lease) => lease?.annotations().get(ADDRESS).cloned(),
                Err(error) => {
                    tracing::warn!(%error, "the Lease of the operator cannot be read");
                    None
                }
            },
        }
    }
}

/// A connection to the leader, made when there is something to say.
struct Leader {
    whereabouts: Whereabouts,
    client: Option<LeaderClient>,
    /// Where another replica said that it is.
    hint: Option<String>,
}

impl Leader {
    async fn client(&mut self) -> Result<LeaderClient, Option<LeaderError>> {
        if self.client.is_none() {
            let address = match self.hint.take() {
                Some(hint) => hint,
                None => self.whereabouts.address().await.ok_or(None)?,
            };
            self.client = Some(LeaderClient::connect(&address).await?);
        }
        Ok(self.client.clone().expect("just made"))
    }

    /// It did not do what was asked: look for it anew next time.
    fn lost(&mut self, error: &LeaderError) {
        self.client = None;
        self.hint = error.leader().map(str::to_owned);
    }
}

/// Tell the leader what drivers report, until they are all gone.
pub async fn report(whereabouts: Whereabouts, mut reports: mpsc::Receiver<DriverReport>) {
    let mut leader = Leader { whereabouts, client: None, hint: None };
    while let Some(report) = reports.recv().await {
        if let Err(error) = tell(&mut leader, &report).await {
            let error = error.map(|error| error.to_string()).unwrap_or_else(|| "nobody leads".to_owned());
            tracing::warn!(volume = %report.volume, server = %report.server, trouble = ?report.trouble, error,
                "the leader was not told that a member is in trouble");
        }
    }
}

async fn tell(leader: &mut Leader, report: &DriverReport) -> Result<(), Option<LeaderError>> {
    // Once more, where the first answer says that the leader is.
    for last in [false, true] {
        let mut client = leader.client().await?;
        match client.report(report).await {
            Ok(()) => return Ok(()),
            Err(error) => {
                leader.lost(&error);
                if last || leader.hint.is_none() {
                    return Err(Some(error));
                }
            }
        }
    }
    Ok(())
}

/// Have a session replaced; `None` = nobody leads.
///
/// # Errors
/// What the leader says.
pub async fn replace(whereabouts: Whereabouts, asked: &Replace) -> Result<Replaced, Option<LeaderError>> {
    let mut leader = Leader { whereabouts, client: None, hint: None };
    let mut client = leader.client().await?;
    match client.replace_session(asked).await {
        Err(error) if error.leader().is_some() => {
            leader.lost(&error);
            Ok(leader.client().await?.replace_session(asked).await?)
        }
        other => Ok(other?),
    }
}

/// Follow the committed maps of a volume by asking the leader, without Kubernetes. Ends when nobody listens.
pub async fn follow(whereabouts: Whereabouts, volume: VolumeId, newest: watch::Sender<Option<VolumeMap>>) {
    let mut leader = Leader { whereabouts, client: None, hint: None };
    while !newest.is_closed() {
        if let Err(Some(error)) = follow_once(&mut leader, volume, &newest).await {
            tracing::warn!(%volume, %error, "maps cannot be followed");
            leader.lost(&error);
        }
        if leader.hint.is_none() {
            // sleep: nobody leads, and a Lease that is written anew is no event here
            tokio::time::sleep(AGAIN).await;
        }
    }
}

async fn follow_once(
    leader: &mut Leader,
    volume: VolumeId,
    newest: &watch::Sender<Option<VolumeMap>>,
) -> Result<(), Option<LeaderError>> {
    let mut maps = leader.client().await?.watch(volume).await?;
    loop {
        let next = tokio::select! {
            next = maps.next() => next,
            () = newest.closed() => return Ok(()),
        };
        let Some(map) = next.transpose()? else {
            leader.client = None;
            return Ok(());
        };
        newest.send_if_modified(|known| {
            let newer = known.as_ref().is_none_or(|known| map.generation > known.generation);
            if newer {
                *known = Some(map);
            }
            newer
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use lamina_control_api::leader::{Leader as Answers, Refusal, Service};
    use lamina_protocol::control::Trouble;
    use lamina_protocol::ids::{CopyId, Generation, ServerId, SessionId};
    use std::net::SocketAddr;
    use tokio::net::TcpListener;

    /// A replica of the operator: leads and notes what it hears, or names who leads.
    struct Replica {
        heard: Option<mpsc::Sender<DriverReport>>,
        leader: Option<String>,
        maps: watch::Receiver<Option<VolumeMap>>,
    }

    impl Answers for Replica {
        fn report(&self, report: DriverReport) -> Result<(), Refusal> {
            match &self.heard {
                Some(heard) => heard.try_send(report).map_err(|_| Refusal::Busy),
                None => Err(Refusal::NotLeader { leader: self.leader.clone() }),
            }
        }

        async fn replace_session(&self, asked: Replace) -> Result<Replaced, Refusal> {
            match self.heard {
                Some(_) if asked.node == "n1" => Ok(Replaced { session: SessionId(9), generation: Generation(5) }),
                Some(_) => Err(Refusal::NotAttached { node: asked.node }),
                None => Err(Refusal::NotLeader { leader: self.leader.clone() }),
            }
        }

        fn maps(&self, _volume: VolumeId) -> Result<watch::Receiver<Option<VolumeMap>>, Refusal> {
            match self.heard {
                Some(_) => Ok(self.maps.clone()),
                None => Err(Refusal::NotLeader { leader: self.leader.clone() }),
            }
        }
    }

    async fn start(replica: Replica) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let router = tonic::transport::Server::builder().add_service(Service::new(replica));
        tokio::spawn(router.serve(address));
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        address
    }

    fn map(generation: u64) -> VolumeMap {
        VolumeMap {
            volume: VolumeId(1),
            generation: Generation(generation),
            format: lamina_protocol::map::MAP_FORMAT,
            required_features: 0,
            size: 4096,
            multi_session: false,
            servers: Vec::new(),
            placements: Vec::new(),
            layers: Vec::new(),
            sessions: Vec::new(),
            revoked: Vec::new(),
        }
    }

    #[tokio::test]
    async fn reports_and_maps_find_the_leader_through_a_replica_that_does_not_lead() {
        let (heard, mut hears) = mpsc::channel(4);
        let (commit, maps) = watch::channel(Some(map(3)));
        let leader = start(Replica { heard: Some(heard), leader: None, maps: maps.clone() }).await;
        let other = start(Replica { heard: None, leader: Some(leader.to_string()), maps }).await;
        let (reports, reported) = mpsc::channel(4);
        let telling = tokio::spawn(report(Whereabouts::Fixed(other.to_string()), reported));
        let said = DriverReport {
            volume: VolumeId(1),
            session: SessionId(2),
            generation: Generation(3),
            copy: CopyId(4),
            server: ServerId(5),
            trouble: Trouble::Stalled,
        };
        reports.send(said.clone()).await.unwrap();
        assert_eq!(hears.recv().await, Some(said));
        drop(reports);
        telling.await.unwrap();

        let ask = |node: &str| Replace { volume: VolumeId(1), session: SessionId(2), node: node.into() };
        let replaced = replace(Whereabouts::Fixed(other.to_string()), &ask("n1")).await.unwrap();
        assert_eq!(replaced, Replaced { session: SessionId(9), generation: Generation(5) });
        let refused = replace(Whereabouts::Fixed(other.to_string()), &ask("n2")).await.unwrap_err();
        assert!(refused.unwrap().is_final());

        let (newest, mut seen) = watch::channel(None);
        let following = tokio::spawn(follow(Whereabouts::Fixed(other.to_string()), VolumeId(1), newest));
        seen.wait_for(|map| map.as_ref().is_some_and(|map| map.generation.0 == 3)).await.unwrap();
        commit.send_replace(Some(map(4)));
        seen.wait_for(|map| map.as_ref().is_some_and(|map| map.generation.0 == 4)).await.unwrap();
        commit.send_replace(Some(map(2)));
        commit.send_replace(Some(map(5)));
        seen.wait_for(|map| map.as_ref().is_some_and(|map| map.generation.0 != 4)).await.unwrap();
        assert_eq!(seen.borrow().as_ref().unwrap().generation, Generation(5), "an older map is never handed on");
        drop(seen);
        tokio::time::timeout(Duration::from_secs(5), following).await.expect("it ends with its listener").unwrap();
    }

    #[tokio::test]
    async fn a_report_that_nobody_hears_is_dropped_and_the_next_one_is_told() {
        let (reports, reported) = mpsc::channel(4);
        let telling = tokio::spawn(report(Whereabouts::Fixed("127.0.0.1:1".into()), reported));
        for _ in 0..3 {
            let said = DriverReport {
                volume: VolumeId(1),
                session: SessionId(2),
                generation: Generation(3),
                copy: CopyId(4),
                server: ServerId(5),
                trouble: Trouble::Unreachable,
            };
            reports.send(said).await.unwrap();
        }
        drop(reports);
        tokio::time::timeout(Duration::from_secs(20), telling).await.expect("nothing waits").unwrap();
    }
}

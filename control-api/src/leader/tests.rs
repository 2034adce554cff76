//! The leader's service over loopback.
#![allow(clippy::unwrap_used)]

use super::*;
use lamina_protocol::control::Trouble;
use lamina_protocol::ids::{CopyId, Generation, ServerId, SessionId};
use std::sync::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;

struct Fake {
    reports: Mutex<Vec<DriverReport>>,
    seen: mpsc::UnboundedSender<DriverReport>,
    maps: watch::Receiver<Option<VolumeMap>>,
}

impl Leader for Fake {
    fn report(&self, report: DriverReport) -> Result<(), Refusal> {
        let mut reports = self.reports.lock().unwrap();
        if reports.len() == 2 {
            return Err(Refusal::NotLeader { leader: Some("leader.example:1".into()) });
        }
        reports.push(report.clone());
        self.seen.send(report).unwrap();
        Ok(())
    }
    fn maps(&self, volume: VolumeId) -> Result<watch::Receiver<Option<VolumeMap>>, Refusal> {
        if volume == VolumeId(7) { Ok(self.maps.clone()) } else { Err(Refusal::NoVolume) }
    }
    async fn replace_session(&self, asked: Replace) -> Result<Replaced, Refusal> {
        match asked {
            Replace { volume: VolumeId(7), session: SessionId(1), node } if node == "n1" => {
                Ok(Replaced { session: SessionId(2), generation: Generation(5) })
            }
            Replace { volume: VolumeId(7), session: SessionId(3), .. } => {
                Err(Refusal::NotYet { waits_for: "a settle".into() })
            }
            Replace { node, .. } => Err(Refusal::NotAttached { node }),
        }
    }
}

fn map(generation: u64) -> VolumeMap {
    VolumeMap {
        format: 1,
        required_features: 0,
        volume: VolumeId(7),
        generation: Generation(generation),
        size: 1 << 20,
        multi_session: false,
        servers: vec![],
        placements: vec![],
        layers: vec![],
        sessions: vec![],
        revoked: vec![],
    }
}

#[tokio::test]
async fn the_last_map_always_comes_and_a_replica_that_does_not_lead_names_the_leader() {
    let (committed, maps) = watch::channel(None);
    let (seen, mut heard) = mpsc::unbounded_channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = Service::new(Fake { reports: Mutex::default(), seen, maps });
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let mut client = LeaderClient::connect(&address).await.unwrap();

    assert!(client.watch(VolumeId(8)).await.unwrap_err().no_volume());
    committed.send(Some(map(1))).unwrap();
    let mut watched = client.watch(VolumeId(7)).await.unwrap();
    assert_eq!(watched.next().await.unwrap().unwrap(), map(1));
    (2..=9).for_each(|generation| committed.send(Some(map(generation))).unwrap());
    while watched.next().await.unwrap().unwrap() != map(9) {}

    let ask = |session, node: &str| Replace { volume: VolumeId(7), session: SessionId(session), node: node.into() };
    let replaced = client.replace_session(&ask(1, "n1")).await.unwrap();
    assert_eq!(replaced, Replaced { session: SessionId(2), generation: Generation(5) });
    assert!(client.replace_session(&ask(1, "n2")).await.unwrap_err().is_final());
    assert!(!client.replace_session(&ask(3, "n1")).await.unwrap_err().is_final());

    let report = DriverReport {
        volume: VolumeId(7),
        session: SessionId(1),
        generation: Generation(9),
        copy: CopyId(2),
        server: ServerId(3),
        trouble: Trouble::Stalled,
    };
    for _ in 0..2 {
        client.report(&report).await.unwrap();
        assert_eq!(heard.recv().await, Some(report.clone()));
    }
    assert_eq!(client.report(&report).await.unwrap_err().leader(), Some("leader.example:1"));
}

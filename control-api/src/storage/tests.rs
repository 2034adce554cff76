//! Sessions over loopback: order, identity, what is malformed.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::v1::storage_control_client::StorageControlClient;
use std::net::SocketAddr;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;

fn here() -> ServerIdentity {
    ServerIdentity { cluster: ClusterId(1), server: ServerId(2), process: 3, addresses: vec!["a.example:4700".into()] }
}

async fn serve() -> (SocketAddr, mpsc::Receiver<Session>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (present, presence) = watch::channel(here());
    let (service, sessions) = Service::new(presence);
    tokio::spawn(async move {
        let _present = present;
        let incoming = TcpListenerStream::new(listener);
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
    });
    (address, sessions)
}

fn expected(cluster: u128, server: u128) -> Expected {
    Expected { cluster: ClusterId(cluster), server: ServerId(server) }
}

#[tokio::test]
async fn calls_arrive_in_order_and_words_come_back() {
    let (address, mut sessions) = serve().await;
    let mut leader = connect(&address.to_string(), expected(1, 2)).await.unwrap();
    assert_eq!(leader.server, here());
    let mut session = sessions.recv().await.unwrap();
    for n in 1..=100 {
        leader.caller.call(CallId(n), &ControlRequest::Heartbeat { lease_number: n }).unwrap();
    }
    for n in 1..=100 {
        let taken = session.next().await.unwrap();
        assert_eq!(taken, Ok((CallId(n), ControlRequest::Heartbeat { lease_number: n })));
    }
    let stale =
        StaleSeen { volume: VolumeId(7), session: SessionId(8), had: Generation(1), need: Generation(u64::MAX) };
    let said = [
        ServerWord::Answer { call: CallId(3), reply: ControlReply::NoSpace },
        ServerWord::AskMap { volume: VolumeId(u128::MAX), at_least: Generation(4) },
        ServerWord::StaleSeen(stale),
    ];
    for word in &said {
        session.answerer().say(word).unwrap();
        assert_eq!(leader.words.next().await.unwrap().as_ref(), Ok(word));
    }
    drop(session);
    assert_eq!(leader.words.next().await, None);
}

#[tokio::test]
async fn a_leader_of_another_cluster_or_for_another_server_is_refused() {
    let (address, _sessions) = serve().await;
    for wrong in [expected(9, 2), expected(1, 9)] {
        let error = connect(&address.to_string(), wrong).await.unwrap_err();
        assert!(matches!(&error, ConnectError::Refused(s) if s.code() == Code::FailedPrecondition), "{error}");
    }
    assert!(connect(&address.to_string(), expected(1, 0)).await.is_ok());
}

#[tokio::test]
async fn garbage_in_a_call_is_malformed_and_nothing_hangs() {
    let (address, mut sessions) = serve().await;
    let hello = v1::LeaderHello { cluster: id_bytes(1), server: vec![], min_version: 1, max_version: 1 };
    let call = v1::Call { call: 1, request: vec![0xff; 9] };
    let words = [v1::to_server::Word::Hello(hello), v1::to_server::Word::Call(call)];
    let words = words.map(|word| v1::ToServer { word: Some(word) });
    let mut client = StorageControlClient::connect(format!("http://{address}")).await.unwrap();
    let mut answers = client.session(tokio_stream::iter(words)).await.unwrap().into_inner();
    let mut session = sessions.recv().await.unwrap();
    let why = session.next().await.unwrap().unwrap_err();
    assert!(matches!(why, Malformed::Encoding { field: "request", .. }));
    session.end(why);
    assert!(answers.message().await.unwrap().is_some(), "the hello");
    assert_eq!(answers.message().await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_full_queue_is_told_and_never_waited_for() {
    let (address, mut sessions) = serve().await;
    let _leader = connect(&address.to_string(), expected(1, 2)).await.unwrap();
    let session = sessions.recv().await.unwrap();
    let volumes = vec![(VolumeId(1), Generation(1)); 4096];
    let reply = ControlReply::Alive(lamina_protocol::control::Alive { behind: volumes, ..Default::default() });
    let word = ServerWord::Answer { call: CallId(1), reply };
    let full = (0..3 * QUEUE_WORDS).any(|_| session.answerer().say(&word) == Err(NotSent::Full));
    assert!(full, "a leader that reads nothing fills the queue");
}

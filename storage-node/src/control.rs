//! The control service: leaders' sessions, on a runtime of their own, handed to the server's thread call by call.
//!
//! Invariant: a session that takes no answers is ended; at most [`MAX_LEADERS`] sessions live at once, so leaders that
//! come and go cost nothing.

use crate::server::Server;
use lamina_control_api::accept::patient;
use lamina_control_api::storage::{Presence, Service, Session};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::TcpListenerStream;

/// Leaders at a time: the one, the deposed ones, and their reconnections.
const MAX_LEADERS: usize = 16;
/// A silent leader is asked for a sign of life this often.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Starts the gRPC server on the present runtime; sessions come out of the queue.
pub(crate) fn listen(listener: TcpListener, presence: Presence) -> mpsc::Receiver<Session> {
    let (service, sessions) = Service::new(presence);
    let server = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(2 * KEEP_ALIVE))
        .add_service(service);
    tokio::spawn(async move {
        // As `patient` never fails, it never ends.
        if let Err(error) = server.serve_with_incoming(pin!(patient(TcpListenerStream::new(listener)))).await {
            tracing::error!("the control service is over: {error}");
        }
    });
    sessions
}

/// Takes sessions for ever.
pub(crate) async fn take_all(server: Rc<Server>, mut sessions: mpsc::Receiver<Session>) {
    while let Some(session) = sessions.recv().await {
        if server.leaders() >= MAX_LEADERS {
            tracing::warn!("a leader was turned away: {MAX_LEADERS} talk already");
            continue;
        }
        tokio::task::spawn_local(serve(server.clone(), session));
    }
}

async fn serve(server: Rc<Server>, mut session: Session) {
    let name = server.mint();
    let over = Rc::new(Notify::new());
    let answers = session.answerer();
    server.leader_came(name, answers.clone(), over.clone());
    tracing::info!("a leader began a session");
    let malformed = loop {
        tokio::select! {
            word = session.next() => match word {
                Some(Ok((call, request))) => server.call(name, call, request),
                Some(Err(why)) => break Some(why),
                None => break None,
            },
            () = over.notified() => break None,
            () = answers.over() => break None,
        }
    };
    server.leader_went(name);
    match malformed {
        Some(why) => {
            tracing::warn!("a leader's session was ended: {why}");
            server.metrics.bad_frame("control");
            session.end(why);
        }
        None => tracing::info!("a leader's session is over"),
    }
}

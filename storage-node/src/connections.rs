//! Connections of drivers and peers to this server.
//!
//! Invariants: at most [`MAX_CONNECTIONS`]; a connection that says no `Hello` in time, breaks a frame or the protocol is
//! closed with one count and one log line (rate limited), and nothing else notices.

use crate::clock;
use crate::link::{Link, LinkError};
use crate::metrics::Account;
use crate::server::Server;
use lamina_protocol::storage_server::ConnId;
use lamina_protocol::wire::read_request;
use rustix::net::sockopt;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// Connections at a time: volumes × nodes, with room.
const MAX_CONNECTIONS: usize = 8192;
/// A `Hello` comes within this time.
const GREETING: Duration = Duration::from_secs(5);
/// After the process ran out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);
/// A connection on which nothing is heard is asked for a sign of life after this time.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// What was sent is acknowledged by the other kernel within this time.
const UNACKNOWLEDGED_MS: u32 = 20_000;

/// An accepted connection.
pub(crate) struct Accepted {
    pub(crate) link: Rc<Link>,
    pub(crate) from: SocketAddr,
    /// Requests under way, for metrics.
    pub(crate) account: RefCell<Account>,
    /// It is to be closed.
    pub(crate) over: Notify,
}

/// Accepts connections for ever.
pub(crate) async fn accept_all(server: Rc<Server>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) if server.connections() < MAX_CONNECTIONS => {
                tokio::task::spawn_local(serve(server.clone(), stream, from));
            }
            Ok(_) => server.metrics.refused_connection("too many"),
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                // sleep: no event tells when accepting is worth trying again.
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn serve(server: Rc<Server>, stream: TcpStream, from: SocketAddr) {
    if prepare(&stream).is_err() {
        return;
    }
    let conn = ConnId(server.mint());
    let link = Rc::new(Link::new(stream));
    let accepted = Rc::new(Accepted { link: link.clone(), from, account: RefCell::default(), over: Notify::new() });
    if !server.admit(conn, accepted.clone()) {
        return server.metrics.refused_connection("no device");
    }
    let ended = tokio::select! {
        error = link.read_frames(GREETING, read_request, |frames| server.frames(conn, frames)) => error,
        error = link.write_rest() => error,
        () = accepted.over.notified() => LinkError::Closed,
    };
    server.closed(conn);
    tell_end(&server, from, &ended);
}

/// Ordinary ends are silent.
fn tell_end(server: &Server, from: SocketAddr, ended: &LinkError) {
    let reason = match ended {
        LinkError::Closed | LinkError::Socket(_) => return,
        LinkError::Truncated => "truncated",
        LinkError::Framing(_) => "framing",
        LinkError::Stuck => "stuck",
        LinkError::NoGreeting => "no greeting",
    };
    server.metrics.bad_frame(reason);
    if let Some(left_out) = server.lines.admit(clock::now()) {
        tracing::warn!(%from, left_out, "connection closed: {ended}");
    }
}

/// Small frames go at once; a client that vanished is noticed.
pub(crate) fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEP_ALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE)?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS)?;
    Ok(())
}

//! `/metrics`, `/healthz`, `/readyz`.
//!
//! Invariant: all three ask the server's thread itself, so one that hangs is not healthy. Ready = the leader has spoken to
//! this very process, and every copy here that a stored map names is `Active` under its present opening (or was given up,
//! so that no map names it); a rollout waits for that.

use crate::devices::DeviceView;
use crate::metrics::Metrics;
use crate::store::Stats;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use lamina_protocol::ids::{ClusterId, ServerId};
use lamina_protocol::storage_server::CopyStanding;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

/// The server's thread answers within this time, or it hangs.
const PATIENCE: Duration = Duration::from_secs(2);
/// Questions that may wait.
pub(crate) const QUESTIONS: usize = 16;

/// How the server is, at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its id; none before its first device was opened.
    pub server: ServerId,
    /// Its devices; counters of those that are open.
    pub devices: Vec<(DeviceView, Option<Stats>)>,
    /// Its copies.
    pub copies: Vec<CopyStanding>,
    /// Connections of drivers and peers.
    pub connections: usize,
    /// A leader has spoken to this process.
    pub heard_leader: bool,
}

impl Snapshot {
    /// Whether a rollout may go on.
    pub fn ready(&self) -> bool {
        self.heard_leader && self.copies.iter().all(CopyStanding::is_settled_in)
    }

    fn why_not(&self) -> String {
        let waiting = self.copies.iter().filter(|copy| !copy.is_settled_in()).count();
        match (self.heard_leader, waiting) {
            (false, _) => "no leader has spoken to this process yet\n".into(),
            (true, 0) => "ready\n".into(),
            (true, waiting) => format!("{waiting} copies are not Active under their present opening\n"),
        }
    }
}

/// A question to the server's thread.
pub(crate) type Question = oneshot::Sender<Snapshot>;

/// Asks the server's thread how it is.
#[derive(Clone)]
pub(crate) struct Asker(pub(crate) mpsc::Sender<Question>);

impl Asker {
    /// `None` if it does not answer in time.
    pub(crate) async fn ask(&self) -> Option<Snapshot> {
        let (question, answer) = oneshot::channel();
        self.0.try_send(question).ok()?;
        tokio::time::timeout(PATIENCE, answer).await.ok()?.ok()
    }
}

/// Serves on the present runtime until the process ends.
pub(crate) fn listen(listener: TcpListener, asker: Asker, metrics: Metrics) {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(scrape))
        .with_state((asker, metrics));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!("the metrics listener is over: {error}");
        }
    });
}

type Shared = State<(Asker, Metrics)>;
const HANGS: (StatusCode, &str) = (StatusCode::SERVICE_UNAVAILABLE, "the server does not answer\n");

async fn healthz(State((asker, _)): Shared) -> (StatusCode, &'static str) {
    if asker.ask().await.is_some() { (StatusCode::OK, "ok\n") } else { HANGS }
}

async fn readyz(State((asker, _)): Shared) -> (StatusCode, String) {
    match asker.ask().await {
        None => (HANGS.0, HANGS.1.into()),
        Some(shown) => {
            let code = if shown.ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            (code, shown.why_not())
        }
    }
}

async fn scrape(State((asker, metrics)): Shared) -> (StatusCode, [(&'static str, &'static str); 1], String) {
    const KIND: [(&str, &str); 1] = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    match asker.ask().await {
        None => (HANGS.0, KIND, HANGS.1.into()),
        Some(shown) => (StatusCode::OK, KIND, metrics.render(&shown)),
    }
}

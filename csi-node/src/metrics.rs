//! `/metrics`, `/healthz` and `/readyz`.
//!
//! Counters are read from the drivers when somebody asks: nothing is counted twice, and nothing is spent while nobody
//! looks. Names end in units; latencies are seconds.

use crate::node::Node;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use lamina_client::runtime::{LATENCY_BUCKETS, Metrics, OpMetrics};
use lamina_csi_api::identity::Readiness;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;

const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the pages show.
#[derive(Clone)]
pub struct Shown {
    /// The volumes.
    pub node: Arc<Node>,
    /// Whether the CSI service serves.
    pub readiness: watch::Receiver<Readiness>,
}

/// The pages.
pub fn router(shown: Shown) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(shown)
}

async fn ready(State(shown): State<Shown>) -> impl IntoResponse {
    match &*shown.readiness.borrow() {
        Readiness::Ready => (StatusCode::OK, "ok".to_owned()),
        Readiness::NotYet => (StatusCode::SERVICE_UNAVAILABLE, "devices are being taken over".to_owned()),
        Readiness::Impossible { reason } => (StatusCode::SERVICE_UNAVAILABLE, reason.clone()),
    }
}

async fn metrics(State(shown): State<Shown>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, TEXT)], page(&shown.node))
}

/// The page in the OpenMetrics text format.
pub fn page(node: &Node) -> String {
    let drivers = node.drivers();
    let mut out = String::new();
    family(&mut out, "lamina_client_volumes", "gauge", "Volumes served on this node.");
    let _ = writeln!(out, "lamina_client_volumes {}", drivers.len());
    let each = |out: &mut String, show: &dyn Fn(&mut String, &str, &Metrics)| {
        for (volume, driver) in &drivers {
            show(out, &volume.to_string(), driver.metrics());
        }
    };
    family(&mut out, "lamina_client_requests", "counter", "Block requests answered.");
    each(&mut out, &|out, volume, m| per_op(out, "requests_total", volume, m, |op| &op.requests));
    family(&mut out, "lamina_client_errors", "counter", "Block requests answered with an error.");
    each(&mut out, &|out, volume, m| per_op(out, "errors_total", volume, m, |op| &op.errors));
    family(&mut out, "lamina_client_transferred_bytes", "counter", "Bytes of requests answered without an error.");
    each(&mut out, &|out, volume, m| per_op(out, "transferred_bytes_total", volume, m, |op| &op.bytes));
    family(&mut out, "lamina_client_latency_seconds", "histogram", "Time to the answer.");
    each(&mut out, &|out, volume, m| {
        for (name, op) in ops(m) {
            histogram(out, volume, name, op);
        }
    });
    type Single = (&'static str, &'static str, fn(&Metrics) -> &AtomicU64);
    let singles: [Single; 5] = [
        ("stale", "Replies that a request was of an older generation.", |m| &m.stale),
        ("connections", "Connections made to storage servers.", |m| &m.connections),
        ("broken_connections", "Connections that broke or could not be made.", |m| &m.broken),
        ("reports_dropped", "Reports to the leader that found the queue full.", |m| &m.reports_dropped),
        ("under_way", "Requests that are not answered yet.", |m| &m.under_way),
    ];
    for (name, help, value) in singles {
        let gauge = name == "under_way";
        family(&mut out, &format!("lamina_client_{name}"), if gauge { "gauge" } else { "counter" }, help);
        let suffix = if gauge { "" } else { "_total" };
        each(&mut out, &|out, volume, m| {
            let value = value(m).load(Ordering::Relaxed);
            let _ = writeln!(out, "lamina_client_{name}{suffix}{{volume=\"{volume}\"}} {value}");
        });
    }
    out.push_str("# EOF\n");
    out
}

fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn ops(metrics: &Metrics) -> [(&'static str, &OpMetrics); 4] {
    [("read", &metrics.reads), ("write", &metrics.writes), ("discard", &metrics.discards), ("flush", &metrics.flushes)]
}

fn per_op(out: &mut String, name: &str, volume: &str, metrics: &Metrics, value: fn(&OpMetrics) -> &AtomicU64) {
    for (op, counters) in ops(metrics) {
        let value = value(counters).load(Ordering::Relaxed);
        let _ = writeln!(out, "lamina_client_{name}{{volume=\"{volume}\",op=\"{op}\"}} {value}");
    }
}

/// Buckets are powers of two from 16 µs on; the counters are not summed up, the format wants them to be.
fn histogram(out: &mut String, volume: &str, op: &str, counters: &OpMetrics) {
    let labels = format!("volume=\"{volume}\",op=\"{op}\"");
    let mut sum = 0;
    for (at, count) in counters.latency.iter().enumerate() {
        sum += count.load(Ordering::Relaxed);
        let bound = match at + 1 {
            LATENCY_BUCKETS => "+Inf".to_owned(),
            _ => format!("{}", (16u64 << at) as f64 / 1e6),
        };
        let _ = writeln!(out, "lamina_client_latency_seconds_bucket{{{labels},le=\"{bound}\"}} {sum}");
    }
    let seconds = counters.latency_us.load(Ordering::Relaxed) as f64 / 1e6;
    let _ = writeln!(out, "lamina_client_latency_seconds_sum{{{labels}}} {seconds}");
    let _ = writeln!(out, "lamina_client_latency_seconds_count{{{labels}}} {sum}");
}

//! Metrics and health of the operator.
//!
//! Invariant: a healthy answer costs no call to anybody: it says what the process knows of itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Labels of a series with one name.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Named {
    /// What it is of.
    pub name: String,
}

/// A volume and one of its states.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct MemberLabels {
    /// Name of the volume.
    pub volume: String,
    /// State of the members counted.
    pub state: &'static str,
}

/// Everything that the operator counts.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Steps of changes that were left (PROTOCOL.md §3).
    pub steps: Family<Named, Counter>,
    /// Writes of status by outcome.
    pub writes: Family<Named, Counter>,
    /// Requests that servers answered `Stale` or `Ended`.
    pub stale: Counter,
    /// Reports of drivers.
    pub reports: Counter,
    /// Events dropped because too many happened at once.
    pub events_dropped: Counter,
    /// Members of a volume by state.
    pub members: Family<MemberLabels, Gauge>,
    /// Configuration generation of a volume.
    pub generation: Family<Named, Gauge>,
    /// 1 while a server answers.
    pub server_up: Family<Named, Gauge>,
    /// 1 while this process leads.
    pub leading: Gauge<i64>,
    /// Bytes left of fills.
    pub pages_left: Family<Named, Gauge>,
    ready: Arc<AtomicBool>,
    beats: Arc<AtomicU64>,
}

impl Metrics {
    /// Says whether calls can be answered.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Whether calls can be answered.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// The leader's loop took something.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("lamina_operator");
        registry.register("steps_passed", "Steps of changes of maps that were left", self.steps.clone());
        registry.register("status_writes", "Writes of volume status by outcome", self.writes.clone());
        registry.register("stale_requests", "Requests answered Stale or Ended, as servers tell", self.stale.clone());
        registry.register("driver_reports", "Reports of drivers", self.reports.clone());
        registry.register("events_dropped", "Events dropped by the rate limit", self.events_dropped.clone());
        registry.register("volume_members", "Members of a volume by state", self.members.clone());
        registry.register("volume_generation", "Configuration generation of a volume", self.generation.clone());
        registry.register("volume_pages_left", "Pages that copies of a volume still need", self.pages_left.clone());
        registry.register("server_up", "1 while the server answers", self.server_up.clone());
        registry.register("leading", "1 while this process leads", self.leading.clone());
        registry
    }

    /// `/metrics`, `/healthz` and `/readyz`.
    pub fn router(&self) -> Router {
        let registry = Arc::new(self.registry());
        let metrics = move || {
            let registry = Arc::clone(&registry);
            async move {
                let mut text = String::new();
                let encoded = prometheus_client::encoding::text::encode(&mut text, &registry);
                encoded.map(|()| text).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
            }
        };
        let this = self.clone();
        let ready = move || async move {
            if this.is_ready() { (StatusCode::OK, "ready") } else { (StatusCode::SERVICE_UNAVAILABLE, "starting") }
        };
        Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(|| async { "ok" }))
            .route("/readyz", get(ready))
    }
}

//! Whole runs: the operator's runtime over real stores, with real storage servers' state machines on loopback.
#![allow(clippy::unwrap_used)]

#[path = "whole/csi.rs"]
mod csi;
#[path = "whole/directory.rs"]
mod directory;
#[path = "whole/kubernetes.rs"]
mod kubernetes;
#[path = "whole/medium.rs"]
mod medium;
#[path = "whole/restored.rs"]
mod restored;
#[path = "whole/servers.rs"]
mod servers;
#[path = "whole/shown.rs"]
mod shown;
#[path = "whole/went_back.rs"]
mod went_back;

use std::time::Duration;

use lamina_operator::front::Front;
use lamina_operator::metrics::Metrics;
use lamina_operator::runtime::{FailPoint, Options};
use lamina_protocol::ids::ClusterId;
use lamina_protocol::management::FillBudget;
use tokio::sync::watch;

/// Everything is done long before; a machine under load is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options, and what stops the leader when it is dropped.
fn options(cluster: ClusterId, die_at: Option<FailPoint>) -> (Options, watch::Sender<bool>) {
    // Said when it fails, if LAMINA_LOG asks for it; the first test sets it for all.
    let filter = tracing_subscriber::EnvFilter::from_env("LAMINA_LOG");
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    let (stopping, stop) = watch::channel(false);
    let (metrics, front) = (Metrics::default(), Front::default());
    let (mint, fill_budget) = (lamina_operator::mint as fn() -> u128, FillBudget::default());
    (Options { cluster, mint, fill_budget, die_at, metrics, front, stop }, stopping)
}

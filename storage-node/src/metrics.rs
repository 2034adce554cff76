//! What is counted, for Prometheus.
//!
//! Invariants: nothing on the way of a block request takes a lock: counters are atomics, found through the connection's own
//! table; what is shown of a copy or device that is gone goes at the next scrape.

use lamina_protocol::ids::VolumeId;
use lamina_protocol::storage_server::{Rot, StorageServer, Violation};
use lamina_protocol::wire::{HandleId, ReplyBody, ReplyFrame, RequestBody, RequestFrame, RequestId};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

mod gauges;

/// Upper bounds of latencies, seconds.
const SECONDS: [f64; 14] =
    [0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Op {
    Read,
    Write,
    Discard,
    Flush,
    Fill,
}

const OPS: [Op; 5] = [Op::Read, Op::Write, Op::Discard, Op::Flush, Op::Fill];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OpLabels {
    volume: String,
    op: Op,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VolumeLabels {
    volume: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    volume: String,
    reply: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

type Histograms = Family<OpLabels, Histogram, fn() -> Histogram>;

/// All counters; clones share them.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Arc<Mutex<Registry>>,
    requests: Family<OpLabels, Counter>,
    bytes: Family<OpLabels, Counter>,
    seconds: Histograms,
    refusals: Family<RefusalLabels, Counter>,
    stale: Family<VolumeLabels, Counter>,
    bad_blocks: Family<VolumeLabels, Counter>,
    repaired_pages: Family<VolumeLabels, Counter>,
    bad_frames: Family<ReasonLabels, Counter>,
    violations: Family<ReasonLabels, Counter>,
    refused_connections: Family<ReasonLabels, Counter>,
    connections: Gauge,
    gauges: gauges::Gauges,
}

impl Metrics {
    /// Nothing counted yet.
    pub(crate) fn new() -> Self {
        let new_histogram: fn() -> Histogram = || Histogram::new(SECONDS);
        let metrics = Self {
            registry: Arc::new(Mutex::new(Registry::with_prefix("lamina_storage"))),
            requests: Family::default(),
            bytes: Family::default(),
            seconds: Family::new_with_constructor(new_histogram),
            refusals: Family::default(),
            stale: Family::default(),
            bad_blocks: Family::default(),
            repaired_pages: Family::default(),
            bad_frames: Family::default(),
            violations: Family::default(),
            refused_connections: Family::default(),
            connections: Gauge::default(),
            gauges: gauges::Gauges::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&self) {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let r = &mut *registry;
        r.register("requests", "Block requests that were served", self.requests.clone());
        r.register_with_unit("request", "Data of block requests that were served", Unit::Bytes, self.bytes.clone());
        r.register_with_unit(
            "request_duration",
            "From the request's frame to the reply's",
            Unit::Seconds,
            self.seconds.clone(),
        );
        r.register("refusals", "Requests answered with a numbered reply instead", self.refusals.clone());
        r.register("volume_bad_blocks", "Blocks that were found bad, by volume", self.bad_blocks.clone());
        r.register("volume_repaired_pages", "Pages made good from another copy", self.repaired_pages.clone());
        r.register("stale_requests", "Requests of an old generation or an ended session", self.stale.clone());
        r.register("bad_frames", "Connections closed for what is no frame", self.bad_frames.clone());
        r.register("protocol_violations", "Connections closed for breaking the protocol", self.violations.clone());
        r.register("refused_connections", "Connections not taken", self.refused_connections.clone());
        r.register("connections", "Connections of drivers and peers", self.connections.clone());
        self.gauges.register(r);
    }

    /// The exposition format of OpenMetrics, after what is shown was brought up to date.
    pub(crate) fn render(&self, shown: &crate::health::Snapshot) -> String {
        self.connections.set(shown.connections as i64);
        self.gauges.show(shown);
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("a String takes everything");
        text
    }

    pub(crate) fn stale(&self, volume: VolumeId) {
        self.stale.get_or_create(&VolumeLabels { volume: volume.to_string() }).inc();
    }

    /// A page with bad blocks was found, or made good from another copy.
    pub(crate) fn rot(&self, rot: &Rot) {
        let labels = VolumeLabels { volume: rot.volume.to_string() };
        if rot.bad > 0 {
            self.bad_blocks.get_or_create(&labels).inc_by(u64::from(rot.bad));
        } else {
            self.repaired_pages.get_or_create(&labels).inc();
        }
    }

    pub(crate) fn violation(&self, why: Violation) {
        let reason = match why {
            Violation::Hello => "hello",
            Violation::WrongCluster => "wrong_cluster",
            Violation::WrongServer => "wrong_server",
            Violation::Version => "version",
            Violation::Window => "window",
            Violation::Place => "place",
            Violation::Handle => "handle",
            Violation::NotAllowed => "not_allowed",
        };
        self.violations.get_or_create(&ReasonLabels { reason }).inc();
    }

    pub(crate) fn bad_frame(&self, reason: &'static str) {
        self.bad_frames.get_or_create(&ReasonLabels { reason }).inc();
    }

    pub(crate) fn refused_connection(&self, reason: &'static str) {
        self.refused_connections.get_or_create(&ReasonLabels { reason }).inc();
    }

    fn of(&self, volume: VolumeId) -> VolumeCounters {
        let labels = OPS.map(|op| OpLabels { volume: volume.to_string(), op });
        VolumeCounters {
            volume,
            requests: labels.each_ref().map(|l| self.requests.get_or_create_owned(l)),
            bytes: labels.each_ref().map(|l| self.bytes.get_or_create_owned(l)),
            seconds: labels.each_ref().map(|l| self.seconds.get_or_create_owned(l)),
        }
    }
}

/// The counters of one volume, by operation.
struct VolumeCounters {
    volume: VolumeId,
    requests: [Counter; OPS.len()],
    bytes: [Counter; OPS.len()],
    seconds: [Histogram; OPS.len()],
}

struct Begun {
    op: Op,
    handle: HandleId,
    bytes: u64,
    at: Instant,
}

/// What a connection has under way. Bounded by the windows of its handles.
#[derive(Default)]
pub(crate) struct Account {
    handles: HashMap<HandleId, VolumeCounters>,
    begun: HashMap<RequestId, Begun>,
}

impl Account {
    /// A request came.
    pub(crate) fn began(&mut self, frame: &RequestFrame, at: Instant, machine: &StorageServer, metrics: &Metrics) {
        let (op, bytes) = match &frame.body {
            RequestBody::Read { place } => (Op::Read, place.length.into()),
            RequestBody::Write { place } => (Op::Write, place.length.into()),
            RequestBody::Discard { place } => (Op::Discard, place.length.into()),
            RequestBody::Flush => (Op::Flush, 0),
            RequestBody::Fill { .. } | RequestBody::Settle { .. } => (Op::Fill, 0),
            _ => return,
        };
        let handle = frame.header.handle;
        if let Entry::Vacant(place) = self.handles.entry(handle) {
            let Some(volume) = machine.volume_behind(handle) else { return };
            place.insert(metrics.of(volume));
        }
        self.begun.insert(frame.header.request, Begun { op, handle, bytes, at });
    }

    /// It is answered.
    pub(crate) fn ended(&mut self, reply: &ReplyFrame, at: Instant, metrics: &Metrics) {
        let Some(begun) = self.begun.remove(&reply.header.request) else { return };
        let Some(counters) = self.handles.get(&begun.handle) else { return };
        if !reply.body.is_success() {
            let labels = RefusalLabels { volume: counters.volume.to_string(), reply: name_of(&reply.body) };
            metrics.refusals.get_or_create(&labels).inc();
            return;
        }
        let op = begun.op as usize;
        counters.requests[op].inc();
        counters.bytes[op].inc_by(begun.bytes.max(reply.payload.len() as u64));
        counters.seconds[op].observe(at.duration_since(begun.at).as_secs_f64());
    }
}

fn name_of(reply: &ReplyBody) -> &'static str {
    match reply {
        ReplyBody::Superseded { .. } => "superseded",
        ReplyBody::Behind { .. } => "behind",
        ReplyBody::Ended => "ended",
        ReplyBody::Revoked => "revoked",
        ReplyBody::Stale { .. } => "stale",
        ReplyBody::NotServing => "not_serving",
        ReplyBody::NoCopy => "no_copy",
        ReplyBody::NoSpace => "no_space",
        ReplyBody::BadBlock { .. } => "bad_block",
        ReplyBody::Below { .. } => "below",
        ReplyBody::Unsupported => "unsupported",
        ReplyBody::OpenRefused { .. } => "open_refused",
        _ => "other",
    }
}

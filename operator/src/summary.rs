//! What people see of volumes, servers and policies, made from what the leader knows: pure.
//!
//! Nothing decides by these but a waiting CSI call, which takes an attachment's phase; that phase follows from the
//! committed map alone (PROTOCOL.md §2, Sessions).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use lamina_crds::Id;
use lamina_crds::condition::{self as api, set_condition};
use lamina_crds::volume::progress::{CopyProgress, CopyWork, VolumeSummary};
use lamina_crds::volume::{Attachment, AttachmentPhase, VolumeState, VolumeStatus};
use lamina_protocol::control::{CopyProgress as Progress, SETTLE_ANEW};
use lamina_protocol::ids::{CopyId, ServerId, VolumeId};
use lamina_protocol::management::{Condition, ConditionKind, Reason, SessionState, VolumeObject};
use lamina_protocol::map::{AccessMode, MemberState, Standing, VolumeMap};

use crate::translate;

/// More pages than a copy can have: what a server says beyond is nonsense, and sums of it stay numbers.
const MOST_PAGES: u64 = 1 << 40;

mod policy;
mod server;

pub use policy::{PolicyDescription, of_policy};
pub use server::{ServerDescription, of_server};

/// A condition of a server or a policy as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its type.
    pub kind: &'static str,
    /// Whether it holds.
    pub status: api::ConditionStatus,
    /// Why, as one word.
    pub reason: String,
    /// Why, in plain words.
    pub text: String,
}

impl Shown {
    fn new(kind: &'static str, status: api::ConditionStatus, reason: &str, text: String) -> Self {
        Self { kind, status, reason: reason.to_owned(), text: cut(text, 4096) }
    }
}

/// Puts these conditions in place of those of their kinds; what else stands there goes.
pub fn write_conditions(shown: &[Shown], into: &mut Vec<api::Condition>, observed: Option<i64>) {
    into.retain(|condition| shown.iter().any(|s| s.kind == condition.kind));
    for s in shown {
        let next = api::Condition {
            kind: s.kind.to_owned(),
            status: s.status,
            reason: s.reason.clone(),
            message: s.text.clone(),
            last_transition_time: Time(Timestamp::now()),
            observed_generation: observed,
        };
        set_condition(into, next);
    }
}

/// What is written of a volume for people.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeDescription {
    /// In one word.
    pub state: VolumeState,
    /// Each session, by its wish, and those that are on their way out.
    pub attachments: Vec<Attachment>,
    /// Copies with work under way.
    pub progress: Vec<CopyProgress>,
    /// In short.
    pub summary: VolumeSummary,
    /// As the leader has them.
    pub conditions: Vec<Condition>,
    /// A map is committed: the shape of the policy is to be copied, if it is not yet.
    pub placed: bool,
}

impl VolumeDescription {
    /// Puts it into a status. `observed` is the `metadata.generation` that was acted on.
    pub fn write(&self, status: &mut VolumeStatus, observed: Option<i64>) {
        status.state = Some(self.state);
        status.attachments.clone_from(&self.attachments);
        status.progress.clone_from(&self.progress);
        status.summary = Some(self.summary.clone());
        status.observed_generation = observed;
        for condition in &self.conditions {
            set_condition(&mut status.conditions, shown_condition(condition, observed));
        }
    }
}

/// A condition as the API shows it, changed now.
fn shown_condition(condition: &Condition, observed: Option<i64>) -> api::Condition {
    api::Condition {
        kind: translate::condition_type(condition.kind),
        status: api::ConditionStatus::from(condition.holds),
        reason: translate::condition_reason(condition),
        message: cut(condition.text.clone(), 4096),
        last_transition_time: Time(Timestamp::now()),
        observed_generation: observed,
    }
}

/// Names of what the core knows by ids.
pub trait Names {
    /// Of a server; its id if it has no object.
    fn server(&self, id: ServerId) -> String;
    /// Of a volume; its id if it has no object.
    fn volume(&self, id: VolumeId) -> String;
}

/// Longest text of a summary's field in the API.
fn cut(text: String, most: usize) -> String {
    if text.chars().count() <= most { text } else { text.chars().take(most - 1).chain(['…']).collect() }
}

fn some(text: String, most: usize) -> Option<String> {
    (!text.is_empty()).then(|| cut(text, most))
}

/// How fast a copy is filled or settled, between two words about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    bytes_per_second: u64,
    pages: u64,
    ms: u64,
}

impl Rate {
    /// From what was said `ms` milliseconds before to what is said now, of the same copy under the same opening.
    #[must_use]
    pub fn between(before: &Progress, now: &Progress, ms: u64) -> Self {
        let (filled, ms) = (now.filled_bytes.saturating_sub(before.filled_bytes), ms.max(1));
        let done = |before: u64, now: u64| if before == SETTLE_ANEW { 0 } else { before.saturating_sub(now) };
        let pages = done(before.unsynced, now.unsynced) + done(before.to_settle, now.to_settle);
        Self { bytes_per_second: filled.saturating_mul(1000) / ms, pages, ms }
    }

    /// Seconds that so many pages more take: by pages, of which many may hold little. `None` = none was done meanwhile.
    fn seconds_for(&self, pages: u64) -> Option<u64> {
        (self.pages > 0).then(|| pages.saturating_mul(self.ms).div_ceil(self.pages.saturating_mul(1000)))
    }
}

/// What people see of a volume. `rates`: of copies with work under way.
pub fn of_volume(
    object: &VolumeObject,
    conditions: &[Condition],
    progress: &[Progress],
    rates: &BTreeMap<CopyId, Rate>,
    names: &dyn Names,
) -> VolumeDescription {
    let map = object.status.map.as_ref();
    let progress: Vec<_> = map.map_or_else(Vec::new, |map| {
        progress.iter().filter_map(|p| copy_progress(map, p, rates.get(&p.copy).copied(), names)).collect()
    });
    VolumeDescription {
        state: state(object, conditions),
        attachments: attachments(object, conditions),
        summary: summary(object, conditions, &progress, names),
        progress,
        conditions: conditions.to_vec(),
        placed: map.is_some(),
    }
}

fn find(conditions: &[Condition], kind: ConditionKind) -> Option<&Condition> {
    conditions.iter().find(|c| c.kind == kind)
}

fn holds(conditions: &[Condition], kind: ConditionKind) -> bool {
    find(conditions, kind).is_some_and(|c| c.holds)
}

fn state(object: &VolumeObject, conditions: &[Condition]) -> VolumeState {
    if object.wishes.deleted {
        VolumeState::Deleting
    } else if holds(conditions, ConditionKind::Diverged) {
        VolumeState::Diverged
    } else if object.status.map.is_none() {
        VolumeState::Pending
    } else if !holds(conditions, ConditionKind::Available) {
        VolumeState::Unavailable
    } else if holds(conditions, ConditionKind::OutOfSpace) {
        VolumeState::OutOfSpace
    } else if holds(conditions, ConditionKind::Healthy) {
        VolumeState::Healthy
    } else {
        VolumeState::Degraded
    }
}

/// The condition that a person should read first.
fn trouble(conditions: &[Condition]) -> Option<&Condition> {
    use ConditionKind::{Available, Deleting, Diverged, Healthy, OutOfSpace, Placed, Settled};
    let bad = |c: &&Condition| match c.kind {
        Diverged | Deleting | OutOfSpace => c.holds,
        Placed => !c.holds || c.reason != Reason::AsWished,
        Available | Healthy | Settled => !c.holds,
    };
    [Diverged, Deleting, Placed, Available, OutOfSpace, Healthy, Settled]
        .iter()
        .find_map(|kind| conditions.iter().filter(bad).find(|c| c.kind == *kind))
}

fn attachments(object: &VolumeObject, conditions: &[Condition]) -> Vec<Attachment> {
    let generation = i64::try_from(object.status.generation.0).ok();
    let why = || trouble(conditions).map(|c| cut(c.text.clone(), 1024));
    let wished = object.wishes.sessions.iter().map(|wish| {
        let (phase, message) = match object.status.session(wish.id) {
            SessionState::Admitted => (AttachmentPhase::Attached, None),
            SessionState::Held => (AttachmentPhase::Held, Some("waits until copies are made equal".to_owned())),
            SessionState::Out => (AttachmentPhase::Waiting, why()),
            SessionState::Ended => {
                let text = "writes were lost by a crash or by a person's force: detach and attach again".to_owned();
                (AttachmentPhase::Ended, Some(text))
            }
        };
        Attachment { session: Id::of(wish.id.0), node: wish.node.clone(), phase, generation, message }
    });
    let sessions = object.status.map.iter().flat_map(|map| &map.sessions);
    let leaving = sessions.filter(|s| object.wishes.sessions.iter().all(|wish| wish.id != s.id));
    let leaving = leaving.map(|session| Attachment {
        session: Id::of(session.id.0),
        node: session.node.clone(),
        phase: AttachmentPhase::Detaching,
        generation,
        message: why(),
    });
    wished.chain(leaving).collect()
}

/// What is done to a copy, the pages to go, and those in all. The numbers are a storage server's word: no copy has as many
/// pages as [`MOST_PAGES`], and a settle whose pages are not known yet, or that must begin anew, says `u64::MAX`.
fn work_left(p: &Progress, syncing: bool) -> (CopyWork, u64, u64) {
    let total = p.pages.min(MOST_PAGES);
    if syncing || p.to_settle == 0 {
        let left = p.unsynced.min(MOST_PAGES);
        return (CopyWork::Filling, left, total.max(left));
    }
    let left = if p.to_settle == SETTLE_ANEW { total } else { p.to_settle.min(MOST_PAGES) };
    (CopyWork::Settling, left, total.max(left))
}

fn copy_progress(map: &VolumeMap, p: &Progress, rate: Option<Rate>, names: &dyn Names) -> Option<CopyProgress> {
    let (_, _, member) = map.place_of(p.copy)?;
    let shown = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let (work, left, total) = work_left(p, member.state == MemberState::Syncing);
    let percent = if left == 0 || total == 0 { 100 } else { (100 * (total - left) / total).min(99) };
    Some(CopyProgress {
        copy: Id::of(p.copy.0),
        server: names.server(member.server),
        work,
        pages_left: shown(left),
        pages_total: shown(total),
        percent: percent as i32,
        bytes_per_second: rate.map(|rate| shown(rate.bytes_per_second)),
        eta_seconds: rate.and_then(|rate| rate.seconds_for(left)).map(shown),
    })
}

fn summary(
    object: &VolumeObject,
    conditions: &[Condition],
    progress: &[CopyProgress],
    names: &dyn Names,
) -> VolumeSummary {
    let map = object.status.map.as_ref();
    let message = trouble(conditions).map(|c| c.text.clone()).unwrap_or_default();
    let Some(map) = map else {
        let doing = if object.wishes.deleted { "being deleted" } else { "waits to be placed" };
        return VolumeSummary {
            doing: Some(doing.to_owned()),
            message: some(message, 1024),
            ..VolumeSummary::default()
        };
    };
    let wanted = object.wishes.policy.map_or(0, |p| usize::from(p.copies) * usize::from(p.groups));
    let active = map.members().filter(|m| m.state == MemberState::Active).count();
    let (left, total) = progress.iter().fold((0, 0), |sum, p| (sum.0 + p.pages_left, sum.1 + p.pages_total));
    let filled = (total > 0).then(|| format!("{}%", (100 * (total - left) / total).clamp(0, 99)));
    VolumeSummary {
        copies: Some(format!("{active}/{}", wanted.max(active))),
        attached: some(attached(map), 512),
        doing: some(doing(object, map, conditions), 128),
        filled,
        located: some(located(map, names), 2048),
        filling: some(progress.iter().map(filling).collect::<Vec<_>>().join(", "), 1024),
        message: some(message, 1024),
    }
}

fn attached(map: &VolumeMap) -> String {
    let one = |s: &lamina_protocol::map::Session| {
        let read_only = if s.mode == AccessMode::ReadOnly { " (ro)" } else { "" };
        format!("{}{read_only}", s.node)
    };
    map.sessions.iter().map(one).collect::<Vec<_>>().join(",")
}

fn doing(object: &VolumeObject, map: &VolumeMap, conditions: &[Condition]) -> String {
    let count = |state| map.members().filter(|m| m.state == state).count();
    let plural = |n: usize, what: &str| if n == 1 { format!("1 {what}") } else { format!("{n} copies") };
    let (syncing, failed) = (count(MemberState::Syncing), count(MemberState::Failed));
    if object.wishes.deleted {
        "being deleted".to_owned()
    } else if map.settling() {
        "makes copies equal".to_owned()
    } else if !holds(conditions, ConditionKind::Available) {
        "waits for its copies".to_owned()
    } else if syncing > 0 {
        format!("fills {}", plural(syncing, "copy"))
    } else if failed > 0 {
        format!("goes on without {}", plural(failed, "copy"))
    } else if map.sessions.iter().any(|s| s.standing == Standing::Held) {
        "holds sessions".to_owned()
    } else if map.sessions.is_empty() {
        "idle".to_owned()
    } else {
        "serving".to_owned()
    }
}

fn located(map: &VolumeMap, names: &dyn Names) -> String {
    let member = |m: &lamina_protocol::map::Member| {
        let mark = match m.state {
            MemberState::Active => "",
            MemberState::Syncing => "~",
            MemberState::Failed => "!",
        };
        format!("{}{mark}", names.server(m.server))
    };
    let group = |g: &lamina_protocol::map::Group| g.members.iter().map(member).collect::<Vec<_>>().join(",");
    map.groups().map(|(_, _, g)| group(g)).collect::<Vec<_>>().join(" ")
}

fn filling(p: &CopyProgress) -> String {
    let rate = p.bytes_per_second.map(|b| format!(" {}/s", size(b.unsigned_abs()))).unwrap_or_default();
    let eta = p.eta_seconds.map(|s| format!(" {}", duration(s.unsigned_abs()))).unwrap_or_default();
    format!("{} {}%{rate}{eta}", p.server, p.percent)
}

/// Bytes with a binary unit and at most one decimal.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    let scaled = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    if unit == 0 || scaled >= 100.0 || scaled.fract() == 0.0 {
        format!("{scaled:.0}{}", UNITS[unit])
    } else {
        format!("{scaled:.1}{}", UNITS[unit])
    }
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_from_pages_and_is_not_known_while_none_was_done() {
        let of = |unsynced, filled_bytes| Progress {
            volume: VolumeId(1),
            copy: CopyId(1),
            boot: lamina_protocol::ids::BootId(1),
            stored: lamina_protocol::ids::Generation(1),
            unsynced,
            pages: 200,
            filled_bytes,
            to_settle: 0,
        };
        // 100 of 1 MiB in 10 s, each with one block of 4 KiB.
        let rate = Rate::between(&of(200, 0), &of(100, 100 << 12), 10_000);
        assert_eq!((rate.bytes_per_second, rate.seconds_for(100)), (40_960, Some(10)));
        assert_eq!(rate.seconds_for(1), Some(1), "never nothing while something is left");
        assert_eq!(Rate::between(&of(100, 4096), &of(100, 4096), 10_000).seconds_for(100), None);
        let settled = |to_settle| Progress { to_settle, ..of(0, 0) };
        assert_eq!(Rate::between(&settled(SETTLE_ANEW), &settled(8), 1_000).seconds_for(8), None, "just begun");
        assert_eq!(Rate::between(&settled(8), &settled(4), 1_000).seconds_for(4), Some(1));
    }

    #[test]
    fn sizes_and_durations_are_short() {
        assert_eq!([0, 1023, 1024, 1536, 118 << 20, 4 << 40].map(size), ["0", "1023", "1Ki", "1.5Ki", "118Mi", "4Ti"]);
        assert_eq!([5, 190, 7200].map(duration), ["5s", "3m10s", "2h00m"]);
    }

    /// Found by the faults through real processes: the operator stopped on it, and no session was admitted any more.
    #[test]
    fn a_settle_that_begins_anew_has_all_pages_to_go_and_nonsense_has_a_limit() {
        let of = |unsynced, to_settle| Progress {
            volume: VolumeId(1),
            copy: CopyId(1),
            boot: lamina_protocol::ids::BootId(1),
            stored: lamina_protocol::ids::Generation(1),
            unsynced,
            pages: 128,
            filled_bytes: 0,
            to_settle,
        };
        assert_eq!(work_left(&of(0, SETTLE_ANEW), false), (CopyWork::Settling, 128, 128));
        assert_eq!(work_left(&of(0, 3), false), (CopyWork::Settling, 3, 128));
        assert_eq!(work_left(&of(7, SETTLE_ANEW), true), (CopyWork::Filling, 7, 128));
        assert_eq!(work_left(&of(u64::MAX, 0), true), (CopyWork::Filling, MOST_PAGES, MOST_PAGES));
        assert_eq!(work_left(&of(0, u64::MAX - 1), false), (CopyWork::Settling, MOST_PAGES, MOST_PAGES));
    }
}

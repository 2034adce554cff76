//! The Lease: who leads, where drivers find it, and a number that each renewal counts up (PROTOCOL.md R6).
//!
//! ```text
//! standing by ── holder gone or silent for 8 s, by the own clock ──> holding ── not renewed for 6 s ──> standing by
//! ```
//! Invariant: each write carries the resource version that was read, so two never both win one term; the number never
//! falls. Safety of volumes does not rest on any of this.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::{mpsc, watch};

use super::Replica;
use crate::store::Change;

/// Name of the Lease, in the operator's namespace.
pub const LEASE: &str = "lamina-operator";
/// Annotation with the leader's `host:port`.
pub const LEADER_ADDRESS: &str = "lamina.dev/leader-address";
/// Annotation with the number.
pub const LEASE_NUMBER: &str = "lamina.dev/lease-number";
/// Between two renewals, and between two looks of those who stand by.
const RENEW: Duration = Duration::from_secs(2);
/// A holder silent for so long has lost it.
const DURATION: Duration = Duration::from_secs(8);
/// A holder that could not renew for so long stops by itself, before others may begin.
const GIVE_UP: Duration = Duration::from_secs(6);
/// One call to the API server.
const PATIENCE: Duration = Duration::from_secs(2);

/// A replica that would lead.
pub struct Candidate {
    api: Api<Lease>,
    identity: String,
    address: String,
    /// What was seen last, and since when nothing changed.
    seen: Option<(Option<String>, Option<Timestamp>, Instant)>,
}

/// A term.
pub struct Held {
    api: Api<Lease>,
    identity: String,
    lease: Lease,
    renewed: Instant,
    /// The number found when it was taken over.
    pub found: u64,
    /// The number written last.
    pub number: u64,
}

/// How a renewal ended.
enum Renewal {
    /// It is this replica's, or still is: a renewal that lost a race is repeated.
    Holds,
    /// It is somebody else's.
    Lost,
    /// It is as it was before a renewal that stood: an old copy was put back.
    WentBack { found: u64 },
}

fn number_of(lease: &Lease) -> u64 {
    let annotations = lease.metadata.annotations.as_ref();
    annotations.and_then(|a| a.get(LEASE_NUMBER)?.parse().ok()).unwrap_or(0)
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
}

fn now() -> MicroTime {
    MicroTime(Timestamp::now())
}

impl Candidate {
    /// This replica; a new process is a new identity.
    pub fn new(client: kube::Client, replica: Replica) -> Self {
        let identity = format!("{}_{:08x}", replica.name, crate::mint() as u32);
        let api = Api::namespaced(client, &replica.namespace);
        Self { api, identity, address: replica.address, seen: None }
    }

    /// Waits until it holds the Lease; says meanwhile where the leader is.
    pub async fn acquire(&mut self, leader: impl Fn(Option<String>)) -> Held {
        let mut look = tokio::time::interval(RENEW);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            match tokio::time::timeout(PATIENCE, self.look(&leader)).await {
                Ok(Ok(Some(held))) => {
                    leader(Some(self.address.clone()));
                    return held;
                }
                Ok(Ok(None)) => {}
                Ok(Err(why)) => tracing::warn!(%why, "the Lease could not be read or taken"),
                Err(_) => tracing::warn!("the API server does not answer"),
            }
        }
    }

    async fn look(&mut self, leader: &impl Fn(Option<String>)) -> Result<Option<Held>, kube::Error> {
        let lease = self.api.get_opt(LEASE).await?;
        let Some(lease) = lease else { return self.take(None).await };
        let annotations = lease.metadata.annotations.as_ref();
        leader(annotations.and_then(|a| a.get(LEADER_ADDRESS).cloned()));
        let renewed = lease.spec.as_ref().and_then(|spec| Some(spec.renew_time.as_ref()?.0));
        let shows = (holder(&lease).map(str::to_owned), renewed);
        let since = match &self.seen {
            Some((holder, time, since)) if (holder, time) == (&shows.0, &shows.1) => *since,
            _ => Instant::now(),
        };
        self.seen = Some((shows.0, shows.1, since));
        let free = holder(&lease).is_none_or(|holder| holder == self.identity) || since.elapsed() > DURATION;
        if free { self.take(Some(lease)).await } else { Ok(None) }
    }

    async fn take(&mut self, before: Option<Lease>) -> Result<Option<Held>, kube::Error> {
        let found = before.as_ref().map_or(0, number_of);
        let mut lease = before.clone().unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() },
            ..Lease::default()
        });
        let spec = lease.spec.get_or_insert_default();
        *spec = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(DURATION.as_secs() as i32),
            acquire_time: Some(now()),
            renew_time: Some(now()),
            lease_transitions: Some(spec.lease_transitions.unwrap_or(0) + 1),
            ..LeaseSpec::default()
        };
        let annotations = lease.metadata.annotations.get_or_insert_default();
        annotations.insert(LEADER_ADDRESS.to_owned(), self.address.clone());
        annotations.insert(LEASE_NUMBER.to_owned(), (found + 1).to_string());
        let began = Instant::now();
        let taken = match before {
            None => self.api.create(&PostParams::default(), &lease).await,
            Some(_) => self.api.replace(LEASE, &PostParams::default(), &lease).await,
        };
        match taken {
            Ok(lease) => {
                let (api, identity) = (self.api.clone(), self.identity.clone());
                Ok(Some(Held { api, identity, lease, renewed: began, found, number: found + 1 }))
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(why) => Err(why),
        }
    }

    /// Gives the Lease back, if it is this replica's, so that another one need not wait.
    pub async fn release(&self) {
        let give_back = async {
            let Some(mut lease) = self.api.get_opt(LEASE).await? else { return Ok(()) };
            if holder(&lease) != Some(&self.identity) {
                return Ok(());
            }
            lease.spec.get_or_insert_default().holder_identity = None;
            self.api.replace(LEASE, &PostParams::default(), &lease).await.map(drop)
        };
        match tokio::time::timeout(PATIENCE, give_back).await {
            Ok(Ok(())) => tracing::info!("the Lease is given back"),
            Ok(Err(why)) => tracing::warn!(%why, "the Lease could not be given back"),
            Err(_) => tracing::warn!("the Lease could not be given back in time"),
        }
    }
}

impl Held {
    /// Renews until that fails for too long, somebody else holds it, or it has gone back: then the next term begins with a
    /// list of everything, and with what servers heard (R6). Says each number, and goes above what `raise` asks.
    pub async fn keep(mut self, changes: mpsc::Sender<Change>, mut raise: watch::Receiver<u64>) {
        loop {
            tokio::select! {
                // sleep: the Lease is renewed by the clock.
                () = tokio::time::sleep(RENEW) => {}
                Ok(()) = raise.changed() => {}
            }
            let above = *raise.borrow_and_update();
            match tokio::time::timeout(PATIENCE, self.renew(above)).await {
                Ok(Ok(Renewal::Holds)) => {
                    // A full queue loses nothing: the next renewal says a higher number.
                    let _ = changes.try_send(Change::LeaseNumber(self.number));
                }
                Ok(Ok(Renewal::Lost)) => {
                    tracing::warn!("another replica holds the Lease");
                    return;
                }
                Ok(Ok(Renewal::WentBack { found })) => {
                    tracing::warn!(found, wrote = self.number, "the Lease went back: the API server was restored");
                    return;
                }
                Ok(Err(why)) => tracing::warn!(%why, "the Lease could not be renewed"),
                Err(_) => tracing::warn!("the API server does not answer"),
            }
            if self.renewed.elapsed() > GIVE_UP {
                return;
            }
        }
    }

    async fn renew(&mut self, above: u64) -> Result<Renewal, kube::Error> {
        let began = Instant::now();
        let number = self.number.max(above).max(number_of(&self.lease)) + 1;
        let mut lease = self.lease.clone();
        lease.spec.get_or_insert_default().renew_time = Some(now());
        lease.metadata.annotations.get_or_insert_default().insert(LEASE_NUMBER.to_owned(), number.to_string());
        match self.api.replace(LEASE, &PostParams::default(), &lease).await {
            Ok(lease) => {
                (self.lease, self.number, self.renewed) = (lease, number, began);
                Ok(Renewal::Holds)
            }
            // Changed by somebody, or the answer to the last renewal was lost.
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let found = self.api.get(LEASE).await?;
                if holder(&found) != Some(&self.identity) {
                    return Ok(Renewal::Lost);
                }
                if number_of(&found) < self.number {
                    return Ok(Renewal::WentBack { found: number_of(&found) });
                }
                self.lease = found;
                Ok(Renewal::Holds)
            }
            Err(why) => Err(why),
        }
    }
}

#[cfg(test)]
mod tests;

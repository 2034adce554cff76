//! One call at a time for one volume: a second one that comes while the first still runs is ABORTED, as CSI asks, and comes
//! again later.
//!
//! Invariants: at most one [`Entered`] per subject is alive; at most `limit` are alive in all, so nothing queues; dropping
//! one, also by cancellation of the call, lets the next in.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic::Status;

use crate::name::{RequestName, VolumeHandle};

/// What a call is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// An existing volume.
    Volume(VolumeHandle),
    /// A volume or snapshot that is being asked for by name.
    Name(RequestName),
}

impl From<VolumeHandle> for Subject {
    fn from(handle: VolumeHandle) -> Self {
        Self::Volume(handle)
    }
}

impl From<RequestName> for Subject {
    fn from(name: RequestName) -> Self {
        Self::Name(name)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(handle) => write!(f, "volume {handle}"),
            Self::Name(name) => write!(f, "name {name}"),
        }
    }
}

/// Why a call may not run now. The caller repeats it after its back-off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// Another call about the same subject still runs: ABORTED.
    #[error("another call for {subject} still runs, try again later")]
    Same {
        /// What both are about.
        subject: Subject,
    },
    /// Too many calls run: UNAVAILABLE (RESOURCE_EXHAUSTED would tell the provisioner that space ran out).
    #[error("{limit} calls run already, try again later")]
    Full {
        /// How many may run.
        limit: usize,
    },
}

impl From<Busy> for Status {
    fn from(busy: Busy) -> Self {
        match busy {
            Busy::Same { .. } => Status::aborted(busy.to_string()),
            Busy::Full { .. } => Status::unavailable(busy.to_string()),
        }
    }
}

/// The calls that run. Clones share them.
#[derive(Clone, Debug)]
pub struct InFlight {
    running: Arc<Mutex<HashSet<Subject>>>,
    limit: usize,
}

impl InFlight {
    /// Nothing runs yet; at most `limit` calls will at any time.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { running: Arc::default(), limit }
    }

    /// Lets a call run until the guard is dropped.
    ///
    /// # Errors
    /// [`Busy`] if another one for the subject, or as many as may, run already.
    pub fn enter(&self, subject: impl Into<Subject>) -> Result<Entered, Busy> {
        let subject = subject.into();
        let mut running = lock(&self.running);
        if running.contains(&subject) {
            return Err(Busy::Same { subject });
        }
        if running.len() >= self.limit {
            return Err(Busy::Full { limit: self.limit });
        }
        running.insert(subject.clone());
        Ok(Entered { running: Arc::clone(&self.running), subject })
    }
}

/// Held while a call runs.
#[derive(Debug)]
#[must_use = "the call counts as over once this is dropped"]
pub struct Entered {
    running: Arc<Mutex<HashSet<Subject>>>,
    subject: Subject,
}

impl Drop for Entered {
    fn drop(&mut self) {
        lock(&self.running).remove(&self.subject);
    }
}

/// The set is whole after every statement, so a panic elsewhere does not spoil it.
fn lock(running: &Mutex<HashSet<Subject>>) -> MutexGuard<'_, HashSet<Subject>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tonic::Code;

    fn volume(id: u128) -> Subject {
        VolumeHandle::new(id).into()
    }

    #[test]
    fn a_second_call_for_the_same_volume_is_aborted_until_the_first_ends() {
        let calls = InFlight::new(8);
        let first = calls.enter(volume(1)).unwrap();
        let again = calls.clone().enter(volume(1)).unwrap_err();
        assert_eq!(Status::from(again).code(), Code::Aborted);
        let _other = calls.enter(volume(2)).unwrap();
        drop(first);
        assert!(calls.enter(volume(1)).is_ok());
    }

    #[test]
    fn a_name_and_a_handle_with_the_same_text_are_different_subjects() {
        let calls = InFlight::new(8);
        let handle = VolumeHandle::new(7);
        let name: RequestName = handle.to_string().parse().unwrap();
        let _one = calls.enter(handle).unwrap();
        assert!(calls.enter(name).is_ok());
    }

    #[test]
    fn no_more_calls_than_the_limit_run() {
        let calls = InFlight::new(2);
        let first = calls.enter(volume(1)).unwrap();
        let _second = calls.enter(volume(2)).unwrap();
        let third = calls.enter(volume(3)).unwrap_err();
        assert_eq!(third, Busy::Full { limit: 2 });
        assert_eq!(Status::from(third).code(), Code::Unavailable);
        drop(first);
        assert!(calls.enter(volume(3)).is_ok());
    }

    #[tokio::test]
    async fn a_cancelled_call_lets_the_next_one_in() {
        let calls = InFlight::new(8);
        let (entered, was_entered) = tokio::sync::oneshot::channel();
        let running = calls.clone();
        let call = tokio::spawn(async move {
            let _guard = running.enter(volume(1)).unwrap();
            entered.send(()).unwrap();
            std::future::pending::<()>().await;
        });
        was_entered.await.unwrap();
        assert!(calls.enter(volume(1)).is_err());
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        assert!(calls.enter(volume(1)).is_ok());
    }
}

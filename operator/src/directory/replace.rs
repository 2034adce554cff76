//! Sessions replaced over a directory (PROTOCOL.md R10).

use std::time::Duration;

use kube::ResourceExt;
use lamina_control_api::leader::{Refusal, Replace, Replaced};

use super::{Directory, Verdict};
use crate::replacement::{self, Sessions};
use crate::store::StoreError;

/// How long a replacement waits for the leader.
const PATIENCE: Duration = Duration::from_secs(30);

/// Replaces sessions in a directory.
pub struct Replacing {
    directory: Directory,
    mint: fn() -> u128,
}

impl Replacing {
    /// In this one. `mint` gives random ids that are never 0 and never repeat.
    pub fn new(directory: Directory, mint: fn() -> u128) -> Self {
        Self { directory, mint }
    }
}

#[tonic::async_trait]
impl Sessions for Replacing {
    async fn replace(&self, asked: &Replace) -> Result<Replaced, Refusal> {
        let (wanted, fresh) = (asked.clone(), (self.mint)());
        let changed = self.directory.change_volume(asked.volume, move |volume| {
            match replacement::wishes(volume, &wanted, fresh) {
                Ok(Some(wishes)) => {
                    volume.spec.attachments = wishes;
                    volume.metadata.generation = Some(volume.metadata.generation.unwrap_or(0) + 1);
                    Verdict::Replace(Ok(volume.name_any()))
                }
                Ok(None) => Verdict::Keep(Ok(volume.name_any())),
                Err(refusal) => Verdict::Keep(Err(refusal)),
            }
        });
        let name = changed.await.map_err(object)?.ok_or(Refusal::NoVolume)??;
        let mut version = self.directory.version();
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            version.mark_unchanged();
            let volume = self.directory.index().volume(&name).cloned();
            match volume.as_ref().map(|volume| replacement::outcome(volume, asked)) {
                None => return Err(Refusal::NoVolume),
                Some(Some(outcome)) => return outcome,
                Some(None) => {}
            }
            if tokio::time::timeout_at(until, version.changed()).await.is_err() {
                return Err(Refusal::NotYet { waits_for: replacement::waits_for(volume.as_ref()) });
            }
        }
    }
}

fn object(why: StoreError) -> Refusal {
    Refusal::Object { why: why.to_string() }
}

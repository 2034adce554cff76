//! What only a person can decide over a directory: which copy goes on where none is up to date (PROTOCOL.md I8), which map
//! holds after a restore (R6), which copies are deleted or let go (R14). With Kubernetes these are fields of `spec`.
//!
//! Invariant: a decision is written as a wish, with the generation for which it was made; the leader acts on it or not.

use lamina_crds::Id;
use lamina_crds::volume::{Force, Volume};
use tonic::Status;

use super::{Verbs, invalid, no_volume, object, v1};

fn ids(texts: &[String]) -> Result<Vec<Id>, Status> {
    let read = |text: &String| {
        let id = Id(text.clone());
        id.value().map(Id::of).ok_or_else(|| invalid(format!("{text} is not the id of a copy: 32 hexadecimal digits")))
    };
    texts.iter().map(read).collect()
}

fn generation_of(volume: &Volume) -> i64 {
    volume.status.as_ref().and_then(|status| status.generation).unwrap_or(0)
}

impl Verbs {
    pub(super) async fn decide_force(&self, request: v1::ForceRequest) -> Result<v1::Object, Status> {
        let v1::ForceRequest { volume: name, generation, copies, others_are_stopped } = request;
        if !others_are_stopped {
            return Err(invalid(
                "stop the servers that do not answer and the nodes that use the volume first, and say so: \
                 --others-are-stopped"
                    .to_owned(),
            ));
        }
        let copies = ids(&copies)?;
        let generation = i64::try_from(generation).map_err(|_| invalid("no such generation".to_owned()))?;
        self.wish(&name, move |volume| {
            let is = generation_of(volume);
            if is != generation {
                return Err(Status::failed_precondition(format!(
                    "the volume is at generation {is}, not {generation}: look at its condition Available again"
                )));
            }
            let force = Some(Force { generation, copies, others_are_stopped });
            Ok((volume.spec.force != force).then(|| volume.spec.force = force))
        })
        .await?;
        let over = |v: &Volume| generation_of(v) > generation;
        let volume = self.wait(&name, "forcing", |v| v.is_none_or(over)).await?.ok_or_else(|| no_volume(&name))?;
        let forced = volume.status.iter().flat_map(|s| &s.forced).any(|f| f.generation > generation);
        if !forced {
            return Err(Status::aborted("nothing was forced: an up-to-date copy answered after all".to_owned()));
        }
        Ok(object(&volume))
    }

    pub(super) async fn decide_adopt(&self, request: v1::AdoptRequest) -> Result<v1::Object, Status> {
        let v1::AdoptRequest { volume: name, generation } = request;
        let wanted = i64::try_from(generation).ok().filter(|g| *g > 0);
        let wanted = wanted.ok_or_else(|| invalid("no such generation".to_owned()))?;
        self.wish(&name, move |volume| {
            let differs = volume.spec.adopt_generation != Some(wanted);
            Ok(differs.then(|| volume.spec.adopt_generation = Some(wanted)))
        })
        .await?;
        let volume = self.wait(&name, "adopting", |v| v.is_none_or(|v| generation_of(v) >= wanted)).await?;
        Ok(object(&volume.ok_or_else(|| no_volume(&name))?))
    }

    pub(super) async fn decide_copies(&self, request: v1::CopiesRequest) -> Result<v1::Object, Status> {
        let v1::CopiesRequest { volume: name, copies, forget } = request;
        let copies = ids(&copies)?;
        let gone = copies.clone();
        self.wish(&name, move |volume| {
            let list = if forget { &mut volume.spec.forget } else { &mut volume.spec.delete_copies };
            let before = list.len();
            let new: Vec<_> = copies.into_iter().filter(|copy| !list.contains(copy)).collect();
            list.extend(new);
            Ok((list.len() > before).then_some(()))
        })
        .await?;
        let out = |v: &Volume| !v.status.iter().flat_map(|s| &s.retired).any(|r| gone.contains(&r.copy));
        let volume = self.wait(&name, "deleting copies of", |v| v.is_none_or(out)).await?;
        Ok(object(&volume.ok_or_else(|| no_volume(&name))?))
    }
}

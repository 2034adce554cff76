//! What people see of a policy.

use lamina_crds::condition::ConditionStatus;
use lamina_protocol::management::placement::Refusal;

use super::Shown;

/// What is written of a policy for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyDescription {
    /// Volumes that use it.
    pub volumes: u64,
    /// Whether a new volume could be placed by it.
    pub conditions: Vec<Shown>,
}

/// What people see of a policy. `refusal`: why no volume of it could be placed now.
pub fn of_policy(volumes: u64, refusal: Option<Refusal>) -> PolicyDescription {
    let kind = "Satisfiable";
    let shown = match refusal {
        None => {
            let text = "there are servers and zones enough for a new volume".to_owned();
            Shown::new(kind, ConditionStatus::True, "EnoughServers", text)
        }
        Some(refusal) => {
            let reason = match refusal {
                Refusal::TooFewServers { .. } => "TooFewServers",
                Refusal::TooFewZones { .. } => "TooFewZones",
                Refusal::TooLarge { .. } => "NoRoom",
                Refusal::UnknownPolicy | Refusal::InvalidWish => "InvalidPolicy",
            };
            Shown::new(kind, ConditionStatus::False, reason, format!("a new volume could not be placed: {refusal}"))
        }
    };
    PolicyDescription { volumes, conditions: vec![shown] }
}

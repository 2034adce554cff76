//! The verbs of people: each asks a serving operator and prints what it says.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use lamina_operator::admin::v1::{self, admin_client::AdminClient};
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

const API_VERSION: &str = "lamina.dev/v1alpha1";

/// Where the operator is and how to print.
#[derive(Args)]
pub(crate) struct At {
    /// Where the operator listens, host:port.
    #[arg(long, env = "LAMINA_OPERATOR", default_value = "127.0.0.1:4710", global = true)]
    operator: String,
    /// How to print: text for people, json or yaml for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Text, global = true)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
    Yaml,
}

/// `volume …`
#[derive(Subcommand)]
pub(crate) enum Volume {
    /// Make a volume and wait until it has its place.
    #[command(after_help = "Example: lamina-operator volume create db --size 10Gi --policy two")]
    Create {
        /// Lower-case letters, digits, '-' and '.'.
        name: String,
        /// 1Mi to 64Ti, such as 10Gi; takes no space until written.
        #[arg(long)]
        size: String,
        /// Name of its replication policy.
        #[arg(long)]
        policy: String,
        /// Who may use it at the same time.
        #[arg(long, value_parser = ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"], default_value = "ReadWriteOnce")]
        access_mode: String,
        /// Node near which the first copies should lie.
        #[arg(long)]
        near: Option<String>,
        #[command(flatten)]
        at: At,
    },
    /// All volumes.
    List {
        #[command(flatten)]
        at: At,
    },
    /// All that is known of one volume.
    Show {
        /// Which.
        name: String,
        #[command(flatten)]
        at: At,
    },
    /// Delete a volume with all its data, and wait until that is done. It must not be attached.
    Delete {
        /// Which.
        name: String,
        #[command(flatten)]
        at: At,
    },
    /// Grow a volume. It never shrinks.
    #[command(after_help = "Example: lamina-operator volume expand db --size 20Gi")]
    Expand {
        /// Which.
        name: String,
        /// The new size, such as 20Gi.
        #[arg(long)]
        size: String,
        #[command(flatten)]
        at: At,
    },
    /// Open a session for a node and wait until it is admitted; prints the ids that a driver needs.
    #[command(after_help = "Example: lamina-operator volume attach db --node $(hostname) -o json")]
    Attach {
        /// Which.
        name: String,
        /// Any name; one session per node.
        #[arg(long)]
        node: String,
        /// The session may only read.
        #[arg(long)]
        read_only: bool,
        #[command(flatten)]
        at: At,
    },
    /// Go on with copies that are behind, where a volume has no up-to-date copy left. What they lack is lost.
    #[command(after_help = "The condition Available of `volume show` names the generation and the copies.\n\
                            Example: lamina-operator volume force db --generation 12 --copy ID --others-are-stopped")]
    Force {
        /// Which.
        name: String,
        /// The volume's generation while you decide; the word holds for it alone.
        #[arg(long)]
        generation: u64,
        /// Id of the copy to go on with; repeated, one of each group that waits.
        #[arg(long, required = true)]
        copy: Vec<String>,
        /// You made sure that the servers that do not answer, and the nodes that use the volume, are stopped.
        #[arg(long, required = true)]
        others_are_stopped: bool,
        #[command(flatten)]
        at: At,
    },
    /// Say which stored map holds from now on, of a volume that is Diverged.
    Adopt {
        /// Which.
        name: String,
        /// Generation of the map; the condition Diverged names those that were found.
        #[arg(long)]
        generation: u64,
        #[command(flatten)]
        at: At,
    },
    /// Delete copies that were kept when another one was forced.
    DeleteCopies {
        /// Which.
        name: String,
        /// Id of the copy; may be repeated.
        #[arg(long, required = true)]
        copy: Vec<String>,
        /// Let the copies go although their servers cannot confirm: those never come back.
        #[arg(long)]
        forget: bool,
        #[command(flatten)]
        at: At,
    },
    /// End the session of a node and wait until it is out.
    Detach {
        /// Which.
        name: String,
        /// The node whose session ends.
        #[arg(long)]
        node: String,
        #[command(flatten)]
        at: At,
    },
}

/// `server …`
#[derive(Subcommand)]
pub(crate) enum Server {
    /// Make a storage server known. It tells its id and where it takes block requests itself.
    #[command(after_help = "Example: lamina-operator server add a --control 127.0.0.1:4701 --zone rack-1")]
    Add {
        /// Lower-case letters, digits, '-' and '.'.
        name: String,
        /// host:port of its control service; may be repeated, tried in order.
        #[arg(long, required = true)]
        control: Vec<String>,
        /// host:port of its block listener, if it does not tell; may be repeated.
        #[arg(long)]
        data: Vec<String>,
        /// Failure domain; copies go over different ones as the policy says.
        #[arg(long)]
        zone: Option<String>,
        #[command(flatten)]
        at: At,
    },
    /// All storage servers.
    List {
        #[command(flatten)]
        at: At,
    },
    /// All that is known of one storage server.
    Show {
        /// Which.
        name: String,
        #[command(flatten)]
        at: At,
    },
    /// Forget a storage server on which no copies lie.
    Delete {
        /// Which.
        name: String,
        #[command(flatten)]
        at: At,
    },
}

/// `policy …`
#[derive(Subcommand)]
pub(crate) enum Policy {
    /// Make a replication policy.
    #[command(after_help = "Example: lamina-operator policy create two --copies 2 --stripe-width 2")]
    Create {
        /// Lower-case letters, digits, '-' and '.'.
        name: String,
        /// Copies of everything, 1 to 5, on different servers.
        #[arg(long)]
        copies: u8,
        /// Groups of servers that a volume is striped over, 1 to 16.
        #[arg(long, default_value_t = 1)]
        stripe_width: u8,
        /// Bytes that lie on one group before the next group's turn, a power of two.
        #[arg(long, default_value = "64Ki")]
        chunk: String,
        /// Unit of allocation and filling, a power of two from 64Ki to 4Mi.
        #[arg(long, default_value = "1Mi")]
        page_size: String,
        /// Each copy in a zone of its own, else the volume is not placed.
        #[arg(long)]
        require_zones: bool,
        /// Seconds that a server may be away before its copies are made anew elsewhere.
        #[arg(long, default_value_t = 600)]
        rebuild_after: u32,
        /// Bytes that may be promised per 100 bytes of a server's capacity.
        #[arg(long, default_value_t = 100)]
        overcommit_percent: u32,
        #[command(flatten)]
        at: At,
    },
    /// All replication policies.
    List {
        #[command(flatten)]
        at: At,
    },
}

type Client = AdminClient<Channel>;

async fn connect(at: &At) -> anyhow::Result<Client> {
    let address = &at.operator;
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .with_context(|| format!("{address} is not host:port"))?
        .connect_timeout(Duration::from_secs(5));
    let hint = || format!("no operator answers at {address}; start one with: lamina-operator serve --directory DIR");
    Ok(AdminClient::new(endpoint.connect().await.with_context(hint)?))
}

fn said(status: tonic::Status) -> anyhow::Error {
    match status.code() {
        tonic::Code::Unimplemented => anyhow::anyhow!("this operator serves Kubernetes: use kubectl"),
        _ => anyhow::anyhow!("{}", status.message()),
    }
}

fn print(at: &At, value: &Value, text: impl FnOnce(&Value) -> String) -> anyhow::Result<ExitCode> {
    match at.output {
        Output::Text => println!("{}", text(value).trim_end()),
        Output::Json => println!("{}", serde_json::to_string_pretty(value)?),
        Output::Yaml => print!("{}", serde_yaml::to_string(value)?),
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(at: &At, kind: &str, name: &str, spec: Value, status: Value) -> anyhow::Result<Value> {
    let mut object =
        json!({"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec, "status": status});
    if status.is_null() {
        object.as_object_mut().map(|fields| fields.remove("status"));
    }
    let object = v1::Object { kind: kind.to_owned(), json: object.to_string() };
    let made = connect(at).await?.create(object).await.map_err(said)?.into_inner();
    Ok(serde_json::from_str(&made.json)?)
}

async fn get(at: &At, kind: &str, name: &str) -> anyhow::Result<Value> {
    let name = v1::Name { kind: kind.to_owned(), name: name.to_owned() };
    let got = connect(at).await?.get(name).await.map_err(said)?.into_inner();
    Ok(serde_json::from_str(&got.json)?)
}

async fn list(at: &At, kind: &str, columns: &[(&str, &str)]) -> anyhow::Result<ExitCode> {
    let kind = v1::Kind { kind: kind.to_owned() };
    let objects = connect(at).await?.list(kind).await.map_err(said)?.into_inner().objects;
    let values = objects.iter().map(|o| serde_json::from_str(&o.json)).collect::<Result<Vec<Value>, _>>()?;
    print(at, &Value::Array(values.clone()), |_| table(columns, &values))
}

async fn delete(at: &At, kind: &str, name: &str) -> anyhow::Result<ExitCode> {
    let asked = v1::Name { kind: kind.to_owned(), name: name.to_owned() };
    connect(at).await?.delete(asked).await.map_err(said)?;
    print(at, &json!({"deleted": name}), |_| format!("{name} is deleted"))
}

/// Rows under their heads, each column as wide as its widest cell.
fn table(columns: &[(&str, &str)], values: &[Value]) -> String {
    let cell = |value: &Value, path: &str| match value.pointer(path) {
        Some(Value::String(text)) => text.clone(),
        None | Some(Value::Null) => String::new(),
        Some(other) => other.to_string(),
    };
    let head = columns.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>();
    let rows = values.iter().map(|value| columns.iter().map(|(_, path)| cell(value, path)).collect());
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

const VOLUME_COLUMNS: [(&str, &str); 9] = [
    ("NAME", "/metadata/name"),
    ("STATE", "/status/state"),
    ("COPIES", "/status/summary/copies"),
    ("SIZE", "/spec/size"),
    ("ATTACHED", "/status/summary/attached"),
    ("DOING", "/status/summary/doing"),
    ("FILLED", "/status/summary/filled"),
    ("WHERE", "/status/summary/where"),
    ("GENERATION", "/status/generation"),
];

const SERVER_COLUMNS: [(&str, &str); 6] = [
    ("NAME", "/metadata/name"),
    ("STATE", "/status/state"),
    ("ZONE", "/spec/zone"),
    ("COPIES", "/status/summary/copies"),
    ("DOING", "/status/summary/doing"),
    ("CONTROL", "/status/addresses/control/0"),
];

const POLICY_COLUMNS: [(&str, &str); 5] = [
    ("NAME", "/metadata/name"),
    ("COPIES", "/spec/copies"),
    ("STRIPE", "/spec/stripeWidth"),
    ("CHUNK", "/spec/chunk"),
    ("PAGE", "/spec/pageSize"),
];

pub(crate) async fn volume(verb: Volume) -> anyhow::Result<ExitCode> {
    match verb {
        Volume::Create { name, size, policy, access_mode, near, at } => {
            let mut spec = json!({"size": size, "policy": policy, "accessMode": access_mode});
            if let Some(node) = near {
                spec["near"] = json!({"node": node});
            }
            let volume = create(&at, "Volume", &name, spec, Value::Null).await?;
            print(&at, &volume, |volume| table(&VOLUME_COLUMNS, std::slice::from_ref(volume)))
        }
        Volume::List { at } => list(&at, "Volume", &VOLUME_COLUMNS).await,
        Volume::Show { name, at } => show(&at, "Volume", &name).await,
        Volume::Delete { name, at } => delete(&at, "Volume", &name).await,
        Volume::Expand { name, size, at } => {
            let request = v1::ExpandRequest { volume: name, size };
            show_volume(&at, connect(&at).await?.expand(request).await)
        }
        Volume::Attach { name, node, read_only, at } => {
            let request = v1::AttachRequest { volume: name, node, read_only };
            let reply = connect(&at).await?.attach(request).await.map_err(said)?.into_inner();
            let v1::AttachReply { volume_id, session, generation } = reply;
            let value = json!({"volumeId": volume_id, "session": session, "generation": generation});
            print(&at, &value, |_| format!("volume {volume_id}\nsession {session}\ngeneration {generation}"))
        }
        Volume::Force { name, generation, copy, others_are_stopped, at } => {
            let request = v1::ForceRequest { volume: name, generation, copies: copy, others_are_stopped };
            show_volume(&at, connect(&at).await?.force(request).await)
        }
        Volume::Adopt { name, generation, at } => {
            let request = v1::AdoptRequest { volume: name, generation };
            show_volume(&at, connect(&at).await?.adopt(request).await)
        }
        Volume::DeleteCopies { name, copy, forget, at } => {
            let request = v1::CopiesRequest { volume: name, copies: copy, forget };
            show_volume(&at, connect(&at).await?.copies(request).await)
        }
        Volume::Detach { name, node, at } => {
            let request = v1::DetachRequest { volume: name.clone(), node: node.clone() };
            connect(&at).await?.detach(request).await.map_err(said)?;
            print(&at, &json!({"detached": node}), |_| format!("{name} is detached from {node}"))
        }
    }
}

fn show_volume(at: &At, answer: Result<tonic::Response<v1::Object>, tonic::Status>) -> anyhow::Result<ExitCode> {
    let volume = serde_json::from_str(&answer.map_err(said)?.into_inner().json)?;
    print(at, &volume, |volume| table(&VOLUME_COLUMNS, std::slice::from_ref(volume)))
}

fn is_host_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
}

async fn show(at: &At, kind: &str, name: &str) -> anyhow::Result<ExitCode> {
    let object = get(at, kind, name).await?;
    print(at, &object, |object| serde_yaml::to_string(object).unwrap_or_default())
}

pub(crate) async fn server(verb: Server) -> anyhow::Result<ExitCode> {
    match verb {
        Server::Add { name, control, data, zone, at } => {
            if let Some(wrong) = control.iter().chain(&data).find(|address| !is_host_port(address)) {
                bail!("{wrong} is not host:port");
            }
            let spec = zone.map_or(json!({}), |zone| json!({"zone": zone}));
            let status = json!({"addresses": {"control": control, "data": data}});
            let server = create(&at, "StorageServer", &name, spec, status).await?;
            print(&at, &server, |_| format!("{name} is known"))
        }
        Server::List { at } => list(&at, "StorageServer", &SERVER_COLUMNS).await,
        Server::Show { name, at } => show(&at, "StorageServer", &name).await,
        Server::Delete { name, at } => delete(&at, "StorageServer", &name).await,
    }
}

pub(crate) async fn policy(verb: Policy) -> anyhow::Result<ExitCode> {
    match verb {
        Policy::Create {
            name,
            copies,
            stripe_width,
            chunk,
            page_size,
            require_zones,
            rebuild_after,
            overcommit_percent,
            at,
        } => {
            let spread = if require_zones { "RequireZones" } else { "PreferZones" };
            let spec = json!({
                "copies": copies, "stripeWidth": stripe_width, "chunk": chunk, "pageSize": page_size,
                "topologySpread": spread, "rebuildAfterSeconds": rebuild_after, "overcommitPercent": overcommit_percent,
            });
            let policy = create(&at, "ReplicationPolicy", &name, spec, Value::Null).await?;
            print(&at, &policy, |policy| table(&POLICY_COLUMNS, std::slice::from_ref(policy)))
        }
        Policy::List { at } => list(&at, "ReplicationPolicy", &POLICY_COLUMNS).await,
    }
}

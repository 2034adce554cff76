//! The cluster's own certificate authority, a certificate for everyone, and the kubeconfigs made of them.
//!
//! Names decide rights: `system:masters` may all, `system:node:NAME` in `system:nodes` is what the Node authorizer looks for.
//!
//! Invariant: either all files of [`Layout::pki`] exist and stem from one authority, or none; they are made aside and renamed.

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::host::{HostError, at, write};
use crate::layout::Layout;
use crate::network::SERVICE_ADDRESS;

/// Why the certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Key or certificate refused by the library.
    #[error("making a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// A file cannot be written.
    #[error(transparent)]
    Host(#[from] HostError),
}

type Authority = CertifiedIssuer<'static, KeyPair>;

/// Makes all certificates, keys and kubeconfigs, if they are not there.
///
/// # Errors
/// The library refuses, or files cannot be written.
pub fn make(layout: &Layout) -> Result<(), CertificateError> {
    let pki = layout.pki();
    if pki.exists() {
        return Ok(());
    }
    let part = pki.with_extension("part");
    if part.exists() {
        at(&part, std::fs::remove_dir_all(&part))?;
    }
    let authority = authority()?;
    write(&part.join("ca.crt"), &authority.pem())?;
    make_servers(layout, &part, &authority)?;
    make_clients(layout, &part, &authority)?;
    // The API server signs the tokens of service accounts with this pair and checks them with it.
    let tokens = KeyPair::generate()?;
    write_secret(&part.join("service-accounts.key"), &tokens.serialize_pem())?;
    write(&part.join("service-accounts.pub"), &tokens.public_key_pem())?;
    Ok(at(&pki, std::fs::rename(&part, &pki))?)
}

fn make_servers(layout: &Layout, to: &Path, authority: &Authority) -> Result<(), CertificateError> {
    let service: Ipv4Addr = SERVICE_ADDRESS.parse().expect("a constant address");
    let own = [layout.control_plane_address(), service, Ipv4Addr::LOCALHOST];
    let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"];
    issue(authority, to, "apiserver", &subject("kube-apiserver", None), &own, &names)?;
    for node in layout.node_ids() {
        let name = subject(&format!("system:node:{node}"), Some("system:nodes"));
        let dns = node.to_string();
        issue(authority, to, &format!("kubelet-{node}-server"), &name, &[layout.node_address(node)], &[&dns])?;
    }
    Ok(())
}

fn make_clients(layout: &Layout, to: &Path, authority: &Authority) -> Result<(), CertificateError> {
    let mut clients = vec![
        ("admin".to_owned(), subject("lamina-admin", Some("system:masters"))),
        ("apiserver-to-kubelet".to_owned(), subject("kube-apiserver", Some("system:masters"))),
        ("controller-manager".to_owned(), subject("system:kube-controller-manager", None)),
        ("scheduler".to_owned(), subject("system:kube-scheduler", None)),
    ];
    for node in layout.node_ids() {
        clients.push((format!("kubelet-{node}"), subject(&format!("system:node:{node}"), Some("system:nodes"))));
    }
    for (file, name) in &clients {
        let pair = issue(authority, to, file, name, &[], &[])?;
        let config = kubeconfig(&layout.server_url(), file, &authority.pem(), &pair);
        write_secret(&to.join(format!("{file}.kubeconfig")), &config)?;
    }
    Ok(())
}

struct Subject {
    user: String,
    group: Option<String>,
}

fn subject(user: &str, group: Option<&str>) -> Subject {
    Subject { user: user.to_owned(), group: group.map(str::to_owned) }
}

struct Pair {
    certificate: String,
    key: String,
}

fn authority() -> Result<Authority, CertificateError> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "lamina-cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn issue(
    authority: &Authority,
    to: &Path,
    file: &str,
    subject: &Subject,
    addresses: &[Ipv4Addr],
    names: &[&str],
) -> Result<Pair, CertificateError> {
    let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(IpAddr::V4(*address))));
    params.distinguished_name.push(DnType::CommonName, &subject.user);
    if let Some(group) = &subject.group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, authority)?;
    let pair = Pair { certificate: certificate.pem(), key: key.serialize_pem() };
    write(&to.join(format!("{file}.crt")), &pair.certificate)?;
    write_secret(&to.join(format!("{file}.key")), &pair.key)?;
    Ok(pair)
}

/// A kubeconfig that needs no other file, so that it can be copied anywhere. JSON is YAML.
fn kubeconfig(server: &str, user: &str, authority: &str, pair: &Pair) -> String {
    let config = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "lamina", "cluster": {
            "server": server, "certificate-authority-data": base64(authority.as_bytes()) } }],
        "users": [{ "name": user, "user": {
            "client-certificate-data": base64(pair.certificate.as_bytes()),
            "client-key-data": base64(pair.key.as_bytes()) } }],
        "contexts": [{ "name": "lamina", "context": { "cluster": "lamina", "user": user } }],
        "current-context": "lamina",
    });
    serde_json::to_string_pretty(&config).expect("plain values are JSON")
}

fn write_secret(path: &Path, text: &str) -> Result<(), HostError> {
    write(path, text)?;
    at(path, std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)))
}

/// RFC 4648 §4.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * place)) as usize & 63];
            text.push(if place <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn base64_agrees_with_the_vectors_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn certificates_are_made_once_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout { dir: dir.path().to_path_buf(), slot: 0, nodes: 2 };
        make(&layout).unwrap();
        let first = std::fs::read(layout.pki().join("ca.crt")).unwrap();
        make(&layout).unwrap();
        assert_eq!(first, std::fs::read(layout.pki().join("ca.crt")).unwrap());
        for file in ["admin.key", "admin.kubeconfig", "kubelet-n2.key", "kubelet-n2-server.key"] {
            let mode = std::fs::metadata(layout.pki().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
    }
}

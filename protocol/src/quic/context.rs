//! The file with which an operator acts: where the admin API is, and a certificate that may use it.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::identity::{Identity, IdentityError, write_secret};
use crate::id::Role;

/// What `--context FILE` holds. `Debug` shows no key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminContext {
    /// The coordinator's cluster address.
    pub address: SocketAddr,
    /// An admin's certificate and key, and the CA that the coordinator is checked against.
    pub identity: Identity,
}

impl AdminContext {
    /// What the file is called in a coordinator's data folder.
    pub const FILE_NAME: &'static str = "admin.context";

    /// Reads the file; `None` where there is none.
    pub fn load(path: &Path) -> Result<Option<Self>, IdentityError> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(IdentityError::Io { path: path.display().to_string(), source });
            }
        };
        let damaged =
            |why: String| IdentityError::Damaged { path: path.display().to_string(), why };
        let (context, rest) =
            postcard::take_from_bytes::<Self>(&bytes).map_err(|e| damaged(e.to_string()))?;
        let identity = context.identity.with_rest(rest).map_err(damaged)?;
        let context = Self { identity, ..context };
        if context.identity.node.role != Role::Admin {
            return Err(damaged(format!("it is {}'s, not an admin's", context.identity.node)));
        }
        Ok(Some(context))
    }

    /// Writes the file, readable by its owner alone, whole or not at all.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        let io = |source| IdentityError::Io { path: path.display().to_string(), source };
        let other = |error| io(io::Error::other(error));
        let mut bytes = postcard::to_stdvec(&self.address).map_err(other)?;
        bytes.extend(self.identity.to_bytes().map_err(other)?);
        write_secret(path, &bytes).map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::NodeId;
    use crate::trust::Trust;

    fn context(node: NodeId) -> AdminContext {
        let identity = Identity::new(node, vec![1], b"secret".to_vec(), vec![3]);
        AdminContext { address: ([127, 0, 0, 1], 4000).into(), identity }
    }

    #[test]
    fn it_survives_the_disk_and_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(AdminContext::FILE_NAME);
        assert!(AdminContext::load(&path).unwrap().is_none());
        let written = context(NodeId::admin(1));
        written.save(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(AdminContext::load(&path).unwrap(), Some(written.clone()));
        assert!(!format!("{written:?}").contains("secret"));
        let trust = Trust { revision: 2, cas: vec![vec![3], vec![4]], lineage: vec![vec![5]] };
        let identity = written.identity.trusting(trust);
        let rotated = AdminContext { identity, ..written };
        rotated.save(&path).unwrap();
        assert_eq!(AdminContext::load(&path).unwrap(), Some(rotated));
    }

    #[test]
    fn what_is_no_context_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c");
        fs::write(&path, b"hello").unwrap();
        assert!(matches!(AdminContext::load(&path), Err(IdentityError::Damaged { .. })));
        context(NodeId::worker(1)).save(&path).unwrap();
        assert!(matches!(AdminContext::load(&path), Err(IdentityError::Damaged { .. })));
    }
}

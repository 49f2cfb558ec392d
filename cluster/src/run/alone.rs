//! `shoal coordinators recover-alone`: the last coordinator goes on without a majority. It works on a
//! data folder, since there is no cluster that could be asked.

use std::time::Duration;

use shoal_coordinator::alone::{AloneError, go_on_alone, survey};

use super::lock::{FolderLock, NODE_LOCK};
use crate::args::RecoverAloneArgs;
use crate::failure::Failure;

/// Shows what would be given up, or gives it up where it is named.
pub async fn run(args: RecoverAloneArgs) -> Result<(), Failure> {
    let data = &args.data;
    // Before the lock makes the folder: a wrong name is not to leave one behind.
    if !data.is_dir() {
        return Err(Failure::refused(format!("there is no folder {}", data.display())));
    }
    let _lock = FolderLock::take(data, NODE_LOCK, Duration::ZERO).await?;
    let found = survey(data).map_err(refused)?;
    let me = found.me;
    let lost = found.others.iter().map(ToString::to_string).collect::<Vec<_>>();
    if args.give_up.is_empty() {
        let workers = found.state.nodes.workers().count();
        let deployments = found.state.deployments.iter().count();
        return Err(Failure::refused(format!(
            "nothing has changed yet. {me} has the log up to entry {} of epoch {}: {workers} workers, \
             {deployments} deployments. It can go on alone if {} are lost FOR EVER:\n  - their machines \
             are off and stay off: while a majority of them runs somewhere, there would be two clusters\n  \
             - what they decided and {me} never heard of is lost\n  - they are refused from then on, and \
             join anew on empty folders, under new numbers\nIf it is so, say it: shoal coordinators \
             recover-alone --data {} --give-up {}",
            found.last,
            found.epoch,
            lost.join(", "),
            data.display(),
            lost.join(","),
        )));
    }
    eprintln!("asking {} whether they are there", lost.join(", "));
    let done = go_on_alone(data, &args.give_up).await.map_err(refused)?;
    eprintln!(
        "{me} votes alone from now on, above epoch {}; {} belong to the cluster no more\nthe log as it was: \
         {}\nstart the coordinator of {} as before, then let new ones join: `shoal token create --role \
         coordinator`, `shoal coordinators add`",
        done.epoch,
        lost.join(", "),
        done.copy.display(),
        data.display(),
    );
    Ok(())
}

/// The operator is told no; a disk that fails is no refusal.
fn refused(error: AloneError) -> Failure {
    match error {
        AloneError::Endpoint(_) | AloneError::Ca(_) => Failure::failed(error.to_string()),
        error => Failure::refused(error.to_string()),
    }
}

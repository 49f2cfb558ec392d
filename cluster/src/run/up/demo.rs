//! What `make demo` shows once the built-in model is served.

use std::io::IsTerminal;

use shoal_protocol::id::DeploymentName;

use crate::builtin::DEMO_QUESTION;
use crate::commands::chat::Chat;
use crate::commands::print;
use crate::failure::Failure;

/// Asks the question, shows the answer, where it was computed and how to ask more. Says whether the
/// demo ends here, as it does where nobody sits at a terminal.
pub async fn show(url: &str, name: &DeploymentName, stages: &str) -> Result<bool, Failure> {
    print(&format!("\nquestion: {DEMO_QUESTION}\nanswer:   "))?;
    let mut chat = Chat::new(url, name.clone(), None);
    let asked = tokio::task::spawn_blocking(move || chat.ask_alone(DEMO_QUESTION));
    asked.await.map_err(|error| Failure::failed(format!("the question broke off: {error}")))??;
    let curl = curl(url, name);
    print(&format!(
        "\nthe layers that it went through:\n\n{stages}\nask more at {url}/v1:\n\n  {curl}\n"
    ))?;
    if !std::io::stdin().is_terminal() {
        return Ok(true);
    }
    eprintln!("\nor type `shoal chat` in another terminal; Ctrl-C stops");
    Ok(false)
}

fn curl(url: &str, name: &DeploymentName) -> String {
    let body = serde_json::json!({
        "model": name,
        "messages": [{"role": "user", "content": DEMO_QUESTION}],
    });
    format!("curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
}

// The saved page alone: no server, the runs are in the page.
{
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const follow = () => document.documentElement.classList.toggle("dark", dark.matches);
  dark.addEventListener("change", follow);
  follow();
  const messages = JSON.parse(document.getElementById("univigu-runs").textContent);
  const viewer = mountTrajectoryViewer(document.querySelector(".uvg"), null);
  const ids = [...new Set(messages.map((message) => message.run))];
  for (const id of ids)
    viewer.receive({ messages: messages.filter((message) => message.run === id).map((message) => ({ beside: id === ids[0] ? null : ids[0], ...message })) });
}

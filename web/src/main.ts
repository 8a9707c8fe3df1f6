import { mount } from "svelte";
import "./theme.css";
import App from "./App.svelte";
import { app } from "./state/app.svelte";
import { embedded } from "./state/comparison";

app.follow(location.hash || (embedded<string>("state") ?? ""));
document.getElementById("static")?.remove();
mount(App, { target: document.getElementById("app")! });

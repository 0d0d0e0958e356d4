// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"sigs.k8s.io/kind/pkg/apis/config/defaults"
	"sigs.k8s.io/kind/pkg/cluster/nodes"
	"sigs.k8s.io/kind/pkg/cluster/nodeutils"

	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
)

// OwnImage is the repository of the node image that `make node-image` makes; its tag is the Kubernetes version.
const OwnImage = "localhost/plimsoll-node"

// OwnImageFile is the name of its archive in the cache.
const OwnImageFile = "node.tar"

// nodeImage is the image that the plan names, or the provider's choice: kind's own pinned one, or on an engine without a way to
// a registry the one that was made here. The engine has it when nodeImage returns.
func (w *world) nodeImage(ctx context.Context) (string, error) {
	wanted := w.plan.NodeImage
	if wanted == "" && !w.engine.Own {
		// kind pulls it when it is not there.
		return defaults.Image, nil
	}
	if wanted != "" && !strings.HasPrefix(wanted, OwnImage) {
		return wanted, nil
	}
	return loadOwnImage(ctx, w.engine, w.plan.Cache, wanted, w.report)
}

// Available says why no kind cluster can be made here, in one line; nil when a container engine answers and has or can get the node
// image, which may take it a while, and the host has room for the default modes. nodeImage and cache are a plan's.
func Available(ctx context.Context, nodeImage, cache string) error {
	e, err := engine.Find(ctx)
	if err != nil {
		return err
	}
	if err := Enough(ctx, e, DefaultNodes, defaultProxies); err != nil {
		return err
	}
	if nodeImage == "" && !e.Own {
		nodeImage = defaults.Image
	}
	if nodeImage == "" || strings.HasPrefix(nodeImage, OwnImage) {
		_, err := OwnArchive(cache)
		return err
	}
	if quiet(e.Command(ctx, "image", "inspect", nodeImage)) == nil {
		return nil
	}
	if err := quiet(e.Command(ctx, "pull", "--quiet", nodeImage)); err != nil {
		return fmt.Errorf("no node image can be had (make node-image makes one): %w", err)
	}
	return nil
}

// OwnArchive is the file of the node image that was made here, in a cache; an error says how to make one.
func OwnArchive(cache string) (string, error) {
	archive := filepath.Join(cache, OwnImageFile)
	if _, err := os.Stat(archive); err != nil {
		return "", fmt.Errorf("no node image in %s: make node-image makes one, or name one with --node-image", cache)
	}
	return archive, nil
}

// ownImage says whether nodes are of the image that was made here.
func (w *world) ownImage() bool { return strings.HasPrefix(w.image, OwnImage+":") }

// loadOwnImage brings the image from the cache into the engine, unless it is there, and returns its name.
func loadOwnImage(ctx context.Context, e engine.Engine, cache, wanted string, report func(string)) (string, error) {
	archive, err := OwnArchive(cache)
	if err != nil {
		return "", err
	}
	stat, err := os.Stat(archive)
	if err != nil {
		return "", err
	}
	// What the engine holds may be of an earlier archive.
	stamp := fmt.Sprintf("%s:%d-%d", OwnImage+"-stamp", stat.ModTime().Unix(), stat.Size())
	if quiet(e.Command(ctx, "image", "inspect", stamp)) == nil {
		return imageOf(ctx, e, stamp)
	}
	report("loading the node image into the container engine")
	out, err := e.Command(ctx, "load", "--input", archive).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("load %s: %w: %s", archive, err, lastLine(out))
	}
	_, name, ok := strings.Cut(lastLine(out), ": ")
	if !ok {
		return "", fmt.Errorf("load %s: the engine did not say what it loaded: %s", archive, lastLine(out))
	}
	if wanted != "" && wanted != OwnImage && name != wanted {
		return "", fmt.Errorf("the cache holds %s, not %s: make node-image", name, wanted)
	}
	return name, errors.Join(removeStamped(ctx, e), quiet(e.Command(ctx, "tag", name, stamp)))
}

// removeStamped removes what the engine holds of earlier archives.
func removeStamped(ctx context.Context, e engine.Engine) error {
	out, err := e.Command(ctx, "images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", "reference="+OwnImage+"-stamp").Output()
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	// By name: an archive that was made again may hold the same image.
	if names := strings.Fields(string(out)); len(names) > 0 {
		return quiet(e.Command(ctx, append([]string{"rmi"}, names...)...))
	}
	return nil
}

// imageOf is the name that the image behind a stamp has.
func imageOf(ctx context.Context, e engine.Engine, stamp string) (string, error) {
	out, err := e.Command(ctx, "image", "inspect", "--format", `{{range .RepoTags}}{{println .}}{{end}}`, stamp).Output()
	if err != nil {
		return "", fmt.Errorf("inspect %s: %w", stamp, err)
	}
	for name := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(name, OwnImage+":") {
			return name, nil
		}
	}
	return "", fmt.Errorf("image %s has lost its name: make node-image", stamp)
}

//go:embed Dockerfile
var dockerfile []byte

// buildPodImage builds the image that the client, the backends and the agent run, from the plan's program.
func (w *world) buildPodImage(ctx context.Context) error {
	dir, err := w.run.Memory("image")
	if err != nil {
		return err
	}
	program, err := os.ReadFile(w.plan.Program)
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "plimsoll"), program, 0o755), os.WriteFile(filepath.Join(dir, "Dockerfile"), dockerfile, 0o644)); err != nil {
		return err
	}
	w.pods = "localhost/plimsoll:" + w.plan.Name
	if err := w.run.Record(host.Containers{Images: []string{w.pods}}); err != nil {
		return err
	}
	w.report("building the image of the pods")
	if err := quiet(w.engine.Command(ctx, "build", "--tag", w.pods, dir)); err != nil {
		return err
	}
	w.archive = filepath.Join(dir, "plimsoll.tar")
	return quiet(w.engine.Command(ctx, "save", "--output", w.archive, w.pods))
}

// loadArchive puts the images of a docker archive into a node.
func loadArchive(n nodes.Node, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	return nodeutils.LoadImageArchive(n, f)
}

// quiet runs a command; its error carries the command's line and the end of what it said.
func quiet(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, lastLine(out))
	}
	return nil
}

// lastLine is the last line of a command's output that is not advice to read its manual.
func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	for len(lines) > 1 && (lines[len(lines)-1] == "" || strings.Contains(lines[len(lines)-1], "--help")) {
		lines = lines[:len(lines)-1]
	}
	return lines[len(lines)-1]
}

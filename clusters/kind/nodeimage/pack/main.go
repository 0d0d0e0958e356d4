// SPDX-License-Identifier: Apache-2.0

// Pack writes container images as docker archives, without an engine: a few files, or whole layers that are tar files already.
//
// Each image is an argument "NAME,KEY=VALUE,…" with the keys base (the tar file of a first layer), layer (a further one), file
// (DEST:SOURCE, a file of mode 755), entrypoint and cmd (words between blanks) and env (NAME:VALUE), each as often as is needed.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sync/errgroup"
)

func main() {
	out := flag.String("out", "", "the archive to write")
	flag.Parse()
	if err := run(*out, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func run(out string, images []string) error {
	if out == "" || len(images) == 0 {
		return errors.New("usage: pack -out FILE IMAGE…")
	}
	refs, made := make([]name.Reference, len(images)), make([]v1.Image, len(images))
	var g errgroup.Group
	g.SetLimit(runtime.NumCPU())
	for i, words := range images {
		g.Go(func() (err error) {
			if refs[i], made[i], err = parse(words); err != nil {
				return fmt.Errorf("image %s: %w", words, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	all := map[name.Reference]v1.Image{}
	for i, ref := range refs {
		all[ref] = made[i]
	}
	f, err := os.Create(out + ".new")
	if err != nil {
		return err
	}
	if err := errors.Join(tarball.MultiRefWrite(all, f), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), out)
}

// parse makes the image that an argument describes.
func parse(words string) (name.Reference, v1.Image, error) {
	settings := strings.Split(words, ",")
	ref, err := name.NewTag(settings[0])
	if err != nil {
		return nil, nil, err
	}
	config := v1.Config{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}}
	var layers []v1.Layer
	var files bytes.Buffer
	archive := tar.NewWriter(&files)
	made := map[string]bool{}
	for _, s := range settings[1:] {
		key, value, _ := strings.Cut(s, "=")
		switch key {
		case "base", "layer":
			l, err := tarball.LayerFromFile(value, tarball.WithCompression(compression.None))
			if err != nil {
				return nil, nil, err
			}
			layers = append(layers, l)
		case "file":
			dest, source, _ := strings.Cut(value, ":")
			if err := add(archive, made, strings.TrimPrefix(dest, "/"), source); err != nil {
				return nil, nil, err
			}
		case "entrypoint":
			config.Entrypoint = strings.Fields(value)
		case "cmd":
			config.Cmd = strings.Fields(value)
		case "env":
			config.Env = append(config.Env, strings.Replace(value, ":", "=", 1))
		case "stopsignal":
			config.StopSignal = value
		default:
			return nil, nil, fmt.Errorf("no key is called %q", key)
		}
	}
	if err := archive.Close(); err != nil {
		return nil, nil, err
	}
	if len(made) > 0 {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil },
			tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithCompressedCaching) // else it is compressed for its digest and once more to be written
		if err != nil {
			return nil, nil, err
		}
		layers = append(layers, l)
	}
	image, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return nil, nil, err
	}
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{Architecture: runtime.GOARCH, OS: "linux", Config: config, RootFS: rootFS(image)})
	return ref, image, err
}

// rootFS is what the layers that were appended made of it.
func rootFS(image v1.Image) v1.RootFS {
	c, err := image.ConfigFile()
	if err != nil {
		return v1.RootFS{Type: "layers"}
	}
	return c.RootFS
}

// add writes a file and the folders above it.
func add(archive *tar.Writer, made map[string]bool, dest, source string) error {
	var folders []string
	for dir := path.Dir(dest); dir != "."; dir = path.Dir(dir) {
		folders = append(folders, dir)
	}
	for i := len(folders) - 1; i >= 0; i-- {
		if made[folders[i]] {
			continue
		}
		made[folders[i]] = true
		if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: folders[i] + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
	}
	b, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	made[dest] = true
	// The same file gives the same image, whenever it was built.
	if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: dest, Mode: 0o755, Size: int64(len(b)), ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err = archive.Write(b)
	return err
}

// Two registries that others wrote, as one program, so that the client meets more than one server:
// go-containerregistry's and CUE Labs'. tests/engine.sh builds it from Debian's source packages.
//
//	weightsmith-test-registries ADDRESS KIND
package main

import (
	"log"
	"net/http"
	"os"

	"cuelabs.dev/go/oci/ociregistry/ocimem"
	"cuelabs.dev/go/oci/ociregistry/ociserver"
	"github.com/google/go-containerregistry/pkg/registry"
)

var kinds = map[string]func() http.Handler{
	"go-containerregistry": func() http.Handler {
		return registry.New(registry.WithReferrersSupport(true))
	},
	"go-containerregistry-old": func() http.Handler { return registry.New() },
	"cuelabs":                  func() http.Handler { return ociserver.New(ocimem.New(), nil) },
	// What the specification leaves to the registry is left out here, as some clouds do.
	"cuelabs-terse": func() http.Handler {
		return ociserver.New(ocimem.New(), &ociserver.Options{
			DisableReferrersAPI:          true,
			DisableSinglePostUpload:      true,
			OmitDigestFromTagGetResponse: true,
			OmitLinkHeaderFromResponses:  true,
		})
	},
}

func main() {
	log.Fatal(http.ListenAndServe(os.Args[1], kinds[os.Args[2]]()))
}
